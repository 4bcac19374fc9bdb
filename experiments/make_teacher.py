"""Make a teacher worth distilling without HeAR's weights: its architecture at small width, trained on real recordings.

in:   a folder of WebDataset tars with captions; a labelled table whose test fold is in none of the tars
out:  <out>/{config.json, model.safetensors, report.json}: a folder that --teacher takes, marked as a stand-in
cost: 7 min of one core with bfloat16 instructions, and half of that for the report

    python experiments/make_teacher.py --source DIR --table esc10.parquet --out teacher

First it reconstructs three quarters of the patches of a view from the others, as a masked autoencoder does (arXiv
2111.06377), where the decoder sees the pooled embedding in the place of the class token: so the pooling learns as well.
Then it learns the words of the captions. That leaves five directions in the class token, although their number has a
term of its own in the loss, so the pooling, which is linear, is replaced at the end by one that weighs the principal
components of the class token more evenly.

B views   V visible patches of N = 96, 12 x 8   D width   E = 512 embedding   K words   256 pixels of a patch
"""

import copy
import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
import tyro
from sounds import (
    Embed,
    Probe,
    Recording,
    effective_rank,
    embed_all,
    entropy_rank,
    read_source,
    spectrograms,
    views,
    vocabulary,
)
from torch import Tensor, nn
from transformers import ViTConfig, ViTModel

from hear_distill.files import write_json
from hear_distill.student import SIZES, Student
from hear_distill.teacher import HEAR_CONFIG, STAND_IN_CONFIG, load_teacher

PATCH, GRID = 16, (12, 8)
NUM_PATCHES = GRID[0] * GRID[1]
NUM_VISIBLE = NUM_PATCHES // 4
DECODER_WIDTH = 96
BATCH = 64
WARMUP = 0.05  # of the steps
WEIGHT_DECAY = 0.05
WANTED_RANK = 128.0  # of views that were trained on; held-out clips have less
POWERS = tuple(i / 100 for i in range(101))
NEGLIGIBLE = 1e-8  # of the largest variance: what is below is noise of the arithmetic


@dataclass(frozen=True, kw_only=True)
class Config:
    """Flags."""

    source: Path
    """folder of tars to learn from; captions are the labels"""
    table: Path
    """labelled recordings with a column fold, to probe with"""
    out: Path
    """folder of the teacher, which is replaced"""
    test_fold: str = "5"
    """of the table: the one that the source has no recording of"""
    width: int = 192
    """of a token"""
    layers: int = 6
    """of the encoder"""
    reconstruct_views: int = 24_576
    """views to learn reconstruction from"""
    label_views: int = 4_096
    """views to learn the words from"""
    spread: float = 0.5
    """weight of the number of directions"""
    start: Path | None = None
    """folder of an earlier teacher: skip the reconstruction, and go on from there"""
    rate: float = 1e-3
    """peak learning rate of AdamW"""
    seed: int = 0
    """of weights, views and masks"""


def place_code(width: int) -> Tensor:
    """[1, N, width]: sines and cosines of row and column, half of the width each, as masked autoencoders take them."""
    quarter = width // 4
    frequency = 1 / 10_000 ** (torch.arange(quarter) / quarter)  # [width / 4]
    row, column = torch.meshgrid(*(torch.arange(n) for n in GRID), indexing="ij")
    angles = [place.reshape(-1, 1) * frequency for place in (row, column)]  # each [N, width / 4]
    return torch.cat([f(angle) for angle in angles for f in (torch.sin, torch.cos)], dim=1)[None]


def new_encoder(width: int, layers: int) -> ViTModel:
    """HeAR's layout, small; a head is 32 wide."""
    small = {"hidden_size": width, "num_hidden_layers": layers, "num_attention_heads": width // 32}
    encoder = ViTModel(ViTConfig(**(HEAR_CONFIG | small | {"intermediate_size": 4 * width, "stand_in": True})))
    encoder.embeddings.position_embeddings.data[:, 1:] = place_code(width)
    return encoder


def patches_of(spectrogram: Tensor) -> Tensor:
    """[B, 1, 192, 128] -> [B, N, 256]"""
    return F.unfold(spectrogram, PATCH, stride=PATCH).transpose(1, 2)


def encode_visible(encoder: ViTModel, spectrogram: Tensor, visible: Tensor) -> tuple[Tensor, Tensor]:
    """[B, 1, 192, 128], [B, V] places -> [B, V, D] tokens and [B, E]: the encoder sees no other patch."""
    embeddings = encoder.embeddings
    x = embeddings.patch_embeddings(spectrogram) + embeddings.position_embeddings[:, 1:]  # [B, N, D]
    x = take(x, visible)  # [B, V, D]
    first = embeddings.cls_token + embeddings.position_embeddings[:, :1]
    x = torch.cat([first.expand(len(x), -1, -1), x], dim=1)  # [B, 1 + V, D]
    for layer in encoder.layers:
        x = layer(x)
    x = encoder.layernorm(x)
    return x[:, 1:], encoder.pooler(x)


def take(tokens: Tensor, places: Tensor) -> Tensor:
    """[B, N, C], [B, V] -> [B, V, C]"""
    return tokens.gather(1, places[:, :, None].expand(-1, -1, tokens.shape[2]))


class Decoder(nn.Module):
    """Pixels of all patches from the tokens of the visible ones and the pooled embedding."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.from_token, self.from_embedding = nn.Linear(width, DECODER_WIDTH), nn.Linear(512, DECODER_WIDTH)
        self.missing = nn.Parameter(torch.zeros(1, 1, DECODER_WIDTH))
        self.register_buffer("places", place_code(DECODER_WIDTH))
        layer = nn.TransformerEncoderLayer(
            DECODER_WIDTH, 3, 4 * DECODER_WIDTH, dropout=0.0, activation="gelu", batch_first=True, norm_first=True
        )
        self.layers = nn.TransformerEncoder(layer, 2, nn.LayerNorm(DECODER_WIDTH), enable_nested_tensor=False)
        self.pixels = nn.Linear(DECODER_WIDTH, PATCH * PATCH)

    def forward(self, tokens: Tensor, visible: Tensor, embedding: Tensor) -> Tensor:
        """[B, V, D], [B, V], [B, E] -> [B, N, 256]"""
        tokens = self.from_token(tokens)
        x = self.missing.expand(len(tokens), NUM_PATCHES, -1).to(tokens.dtype)
        x = x.scatter(1, visible[:, :, None].expand(-1, -1, DECODER_WIDTH), tokens) + self.places
        x = self.layers(torch.cat([self.from_embedding(embedding)[:, None], x], dim=1))  # [B, 1 + N, C]
        return self.pixels(x[:, 1:])


def reconstruction_loss(
    encoder: ViTModel, decoder: Decoder, spectrogram: Tensor, scale: tuple[Tensor, Tensor]
) -> Tensor:
    """Mean squared error of the hidden patches, in the unit of the pixels' variance: 1 is no better than the mean."""
    order = torch.rand(len(spectrogram), NUM_PATCHES).argsort(dim=1)
    visible, hidden = order[:, :NUM_VISIBLE], order[:, NUM_VISIBLE:]
    predicted = decoder(*_seen(encoder, spectrogram, visible))
    target = (patches_of(spectrogram) - scale[0]) / scale[1]
    return (take(predicted.float(), hidden) - take(target, hidden)).square().mean()


def _seen(encoder: ViTModel, spectrogram: Tensor, visible: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    tokens, embedding = encode_visible(encoder, spectrogram, visible)
    return tokens, visible, embedding


def spread_loss(embedding: Tensor) -> Tensor:
    """[B, E] -> -log of the participation ratio, (sum of eigenvalues)^2 / sum of their squares, of the covariance.

    The ratio lies between 1, all on a line, and B - 1, alike in as many directions as a batch can have. Unlike the
    variance and covariance terms of VICReg (arXiv 2105.04906) it does not depend on the scale.
    """
    centred = embedding - embedding.mean(dim=0)
    gram = centred @ centred.T  # [B, B], with the eigenvalues of the covariance up to a factor
    return gram.square().sum().log() - 2 * gram.trace().log()


def fixed_axes(num_axes: int) -> Tensor:
    """[E, num_axes]: orthonormal directions of the embedding, always the same."""
    generator = torch.Generator().manual_seed(0)
    return torch.linalg.qr(torch.randn(512, num_axes, generator=generator)).Q


def word_targets(words: list[frozenset[str]], known: list[str]) -> Tensor:
    """[B, K]: the words of each view, in equal shares; zeros for a view whose words are all rare."""
    hits = torch.tensor([[float(word in of_view) for word in known] for of_view in words])
    return hits / hits.sum(dim=1, keepdim=True).clamp_min(1)


def learn(
    name: str, parameters: list[nn.Parameter], rate: float, num_views: int, loss_of: Callable[[range], Tensor]
) -> None:
    """Minimise `loss_of` the indices of each batch: AdamW, warm-up, half a wave down to zero."""
    optimizer = torch.optim.AdamW(parameters, lr=rate, betas=(0.9, 0.95), weight_decay=WEIGHT_DECAY)
    steps = num_views // BATCH
    began = time.process_time()
    for step in range(steps):
        warm = min(1.0, (step + 1) / max(1, WARMUP * steps))
        for group in optimizer.param_groups:
            group["lr"] = rate * warm * (1 + math.cos(math.pi * step / steps)) / 2
        with torch.autocast("cpu", torch.bfloat16):
            loss = loss_of(range(step * BATCH, (step + 1) * BATCH))
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        if step % 20 == 0 or step == steps - 1:
            cpu_s = time.process_time() - began
            print(f"{name}: step {step + 1} of {steps}, loss {loss.detach():.4f}, CPU {cpu_s:.0f} s", flush=True)


def pretrain(config: Config, recordings: list[Recording]) -> ViTModel:
    """An encoder that learned to reconstruct."""
    torch.manual_seed(config.seed)
    encoder, decoder = new_encoder(config.width, config.layers), Decoder(config.width)
    pixels = spectrograms(views(recordings, config.seed + 1, range(256))[0])
    scale = pixels.mean(), pixels.std()

    def loss_of(indices: range) -> Tensor:
        spectrogram = spectrograms(views(recordings, config.seed, indices)[0])
        return reconstruction_loss(encoder, decoder, spectrogram, scale)

    parameters = [*encoder.parameters(), *decoder.parameters()]
    learn("reconstruct", parameters, config.rate, config.reconstruct_views, loss_of)
    return encoder


def learn_words(config: Config, recordings: list[Recording], encoder: ViTModel) -> ViTModel:
    """A copy of the encoder whose embedding tells the words of the caption."""
    encoder, known = copy.deepcopy(encoder), vocabulary(recordings)
    head = nn.Linear(512, len(known))
    print(f"{len(known)} words: {', '.join(known)}")

    def loss_of(indices: range) -> Tensor:
        samples, words = views(recordings, config.seed + 2, indices)
        embedding = encoder(spectrograms(samples)).pooler_output.float()
        loss = F.cross_entropy(head(embedding).float(), word_targets(words, known))
        return loss + config.spread * spread_loss(embedding)

    learn("words", [*encoder.parameters(), *head.parameters()], config.rate, config.label_views, loss_of)
    return encoder


@torch.no_grad()
def equalise(encoder: ViTModel, spectrogram: Tensor) -> float:
    """Replace the pooling by W (h - mean) of the class token h, so that the embeddings of these views have enough rank.

    Along the principal components of h, of variance v, the embedding has the variance v^(1 - power), along directions
    that are fixed. The power, which is returned, is the smallest that gives WANTED_RANK: 1 would be whitening.
    """
    tokens = torch.cat([encoder(part).last_hidden_state[:, 0] for part in spectrogram.split(BATCH)]).double()  # [n, D]
    mean = tokens.mean(dim=0)
    _, singular, components = torch.linalg.svd(tokens - mean, full_matrices=False)
    variance = (singular.square() / len(tokens)).clamp_min(NEGLIGIBLE * singular[0].square() / len(tokens))  # [D]
    power = next(p for p in POWERS if entropy_rank(variance ** (1 - p)) >= WANTED_RANK or p == POWERS[-1])
    weight = fixed_axes(len(variance)).double() * variance ** (-power / 2) @ components  # [E, D]
    encoder.pooler.dense.weight.copy_(weight)
    encoder.pooler.dense.bias.copy_(-weight @ mean)
    return power


def describe(embed: Embed, probe: Probe, held_out: Tensor) -> dict[str, float]:
    """Effective rank of the embeddings of the held-out clips, and what a probe reads there."""
    return {"effective_rank": effective_rank(embed_all(embed, held_out)), **probe.measure(embed)}


def main(config: Config) -> None:
    began = time.process_time()
    recordings, probe = read_source(config.source), Probe(config.table, config.test_fold)
    held_out = probe.test_spectrograms()
    print(f"{len(recordings)} recordings; {len(held_out)} clips are held out")

    reconstructing = (
        load_teacher(config.start).model.requires_grad_(True) if config.start else pretrain(config, recordings)
    )
    encoder = learn_words(config, recordings, reconstructing)
    before = copy.deepcopy(encoder)
    power = equalise(encoder, spectrograms(views(recordings, config.seed + 3, range(1024))[0]))
    encoder.save_pretrained(config.out)
    cpu_s = time.process_time() - began
    teacher = load_teacher(config.out)
    models = {"teacher": teacher, "before it was equalised": _pooled(before)}
    models |= {"before the words": _pooled(reconstructing), **untrained(config.seed)}
    found = {name: describe(model, probe, held_out) for name, model in models.items()}
    write_json(
        config.out / "report.json",
        {"revision": teacher.revision, "training_cpu_s": round(cpu_s), "power": power, **found},
    )
    for name, values in found.items():
        print(f"{name:26}" + ", ".join(f"{key} {value:.3f}" for key, value in values.items()))
    print(f"training took {cpu_s / 60:.1f} min of CPU")


def untrained(seed: int) -> dict[str, Embed]:
    """What a teacher must be better than to be worth distilling."""
    torch.manual_seed(seed)
    random_stand_in = ViTModel(ViTConfig(**STAND_IN_CONFIG)).eval()
    return {"random stand-in": _pooled(random_stand_in), "untrained student": Student(SIZES["small"]).eval()}


def _pooled(model: ViTModel) -> Embed:
    return lambda spectrogram: model(spectrogram).pooler_output


if __name__ == "__main__":
    main(tyro.cli(Config, description=__doc__))
