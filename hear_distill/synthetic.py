"""Synthetic recordings for the demo and the tests: seven labelled sounds, the same bytes for the same arguments.

in:   a seed and counts
out:  a folder of tars in the layout of laion/LAION-Audio-300M, a labelled parquet table, or a folder of sound files;
      no network, no torch

The sounds are source and filter: noise (air) or pulses (glottis, palate) through the resonances of a vocal tract, under
an envelope of events. They stand in for real ones where a pipeline has to run; they are no benchmark of anything.

n samples   f = n // 2 + 1 frequencies   e events   p points of a curve
"""

import io
import json
import math
import shutil
import tarfile
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import soundfile

from hear_distill.files import atomic_write, fsync_folder, write_json

MANIFEST = "synthetic.json"
VERSION = 1  # raise it when a change alters the bytes written below
NUM_FOLDS = 5
RUNS_PER_TAR = 3  # stretches of one label: like the dataset, a tar is not a sample of the whole
RECORDINGS_PER_VIDEO = 3  # neighbours in a tar that share a voice and a title
MISSING_TAR = 1  # the dataset's indices have gaps, so nobody may generate names
# (sample rate, channels, share): mostly what encodes fast, and enough of the rest to exercise downmix and resampling
FORMATS = ((16_000, 1, 0.55), (22_050, 1, 0.2), (44_100, 1, 0.1), (16_000, 2, 0.1), (44_100, 2, 0.05))
# First three resonances in Hz of ten English vowels, men: Peterson and Barney (1952), table II
VOWELS_HZ = (
    (270, 2290, 3010),
    (390, 1990, 2550),
    (530, 1840, 2480),
    (660, 1720, 2410),
    (730, 1090, 2440),
    (570, 840, 2410),
    (440, 1020, 2240),
    (300, 870, 2240),
    (640, 1190, 2390),
    (490, 1350, 1690),
)

Points = Sequence[tuple[float, float]]  # (seconds after the onset, value)


def generator(seed: int, purpose: str, index: int) -> np.random.Generator:
    """The random numbers of one thing, independent of every other: what is made before it does not matter."""
    return np.random.default_rng([seed, index, int.from_bytes(purpose.encode())])


@dataclass(frozen=True)
class Take:
    """One recording in the making: its random numbers, its length, and the voice that is heard."""

    rng: np.random.Generator
    rate: int
    num_samples: int
    pitch_hz: float
    tract: float
    """resonance frequencies relative to those of an average man"""

    @cached_property
    def time_s(self) -> np.ndarray:
        """[n]"""
        return np.arange(self.num_samples) / self.rate

    @cached_property
    def hz(self) -> np.ndarray:
        """[f]"""
        return np.fft.rfftfreq(self.num_samples, 1 / self.rate).astype(np.float32)

    def onsets(self, shortest_s: float, longest_s: float) -> np.ndarray:
        """[e] seconds: the first event starts within 0.3 s, the next ones a random gap apart, up to the end."""
        duration_s = self.num_samples / self.rate
        gaps = self.rng.uniform(shortest_s, longest_s, 1 + int(duration_s / shortest_s))  # [e]
        starts = self.rng.uniform(0, 0.3) + np.cumsum(gaps) - gaps[0]
        return starts[starts < duration_s]

    def curve(self, onsets: np.ndarray, points: Points, spread: float = 0.0) -> np.ndarray:
        """[e], p points -> [n]: straight lines through the points of each event, which must not overlap.

        The values of each event are shifted by one normal draw of standard deviation `spread`.
        """
        delays, values = np.array(points).T  # [p]
        times = onsets[:, None] + delays  # [e, p]
        shifted = values + self.rng.normal(0, spread, (len(onsets), 1))  # [e, p]
        return np.interp(self.time_s, times.ravel(), shifted.ravel())

    def envelope(self, onsets: np.ndarray, points_db: Points) -> np.ndarray:
        """[e], p points in dB -> [n] amplitudes: straight lines in dB are the exponential decays of real sounds."""
        return 10 ** (self.curve(onsets, points_db, spread=3) / 20)

    def wander(self, points_per_s: float) -> np.ndarray:
        """[n]: normal draws at this pace, joined by straight lines."""
        return self.curve(np.arange(0, self.num_samples / self.rate, 1 / points_per_s), [(0, 0)], spread=1)

    def air(self) -> np.ndarray:
        """[f] spectrum of white noise, drawn as such: that saves the forward transform."""
        return self.rng.standard_normal(2 * len(self.hz), dtype=np.float32).view(np.complex64)

    def pulses(self, pitch_hz: np.ndarray) -> np.ndarray:
        """[n] -> [f] spectrum of a train of ones, one wherever a period of the changing pitch is complete."""
        train = np.diff(np.floor(np.cumsum(pitch_hz) / self.rate), prepend=0)
        return np.fft.rfft(train.astype(np.float32))

    def resonate(self, spectrum: np.ndarray, *peaks: tuple[float, float, float]) -> np.ndarray:
        """[f] -> [n]: the source through a sum of resonances (centre in Hz, width in Hz, gain), at unit variance.

        Each is the analogue two-pole band-pass: `gain` at its centre, falling by 6 dB per octave far from it.
        """
        response = np.zeros(len(self.hz), np.complex64)  # [f]
        for centre, width, gain in np.array(peaks, np.float32):
            damping = 1j * width * self.hz
            response += gain * damping / (centre**2 - self.hz**2 + damping)
        filtered = np.fft.irfft(spectrum * response, self.num_samples)  # [n]
        return filtered / filtered.std()


def cough(take: Take) -> np.ndarray:
    """Bouts of one to four: a burst of air as the glottis opens, a quieter flow, a more or less voiced end."""
    rng = take.rng
    spacing_s = rng.uniform(0.32, 0.5)
    bouts = [start + spacing_s * np.arange(rng.integers(1, 5)) for start in take.onsets(2.2, 4.5)]
    onsets = np.concatenate(bouts)
    air = take.resonate(take.air(), (500 * take.tract, 500, 1), (1500 * take.tract, 900, 1), (4000, 3000, 0.6))
    pitch = take.pitch_hz * take.curve(onsets, [(0, 1.8), (0.3, 1.0)])
    voice = take.resonate(take.pulses(pitch), (650 * take.tract, 200, 1), (1300 * take.tract, 300, 0.4))
    burst = take.envelope(onsets, [(0, -60), (0.01, 0), (0.06, -12), (0.2, -20), (0.28, -60)])
    voiced = take.envelope(onsets, [(0.05, -60), (0.12, rng.uniform(-30, -6)), (0.2, -18), (0.31, -60)])
    return burst * air + voiced * voice


def breath(take: Take) -> np.ndarray:
    """Cycles of a brighter breath in, a pause and a darker, longer breath out."""
    rng = take.rng
    onsets = take.onsets(3.0, 4.5)
    length_in, length_out = rng.uniform(0.7, 1.2), rng.uniform(0.9, 1.6)
    hump = np.array([(0, -50), (0.25, -5), (0.5, 0), (0.75, -6), (1, -50)])
    level_out = rng.uniform(-6, 6)
    points_in, points_out = hump * (length_in, 1), hump * (length_out, 1) + (length_in + 0.15, level_out)
    bright = take.resonate(take.air(), (1800 * take.tract, 900, 1), (rng.uniform(3500, 5000), 2000, 0.6))
    dark = take.resonate(take.air(), (700 * take.tract, 500, 1), (1700 * take.tract, 800, 0.5))
    return take.envelope(onsets, points_in) * bright + take.envelope(onsets, points_out) * dark


def sneeze(take: Take) -> np.ndarray:
    """A gasp that rises, then one hissing burst with a voice under it."""
    rng = take.rng
    onsets = take.onsets(3.0, 6.0)
    gasp_s, burst_s = rng.uniform(0.3, 0.8), rng.uniform(0.15, 0.4)
    gasp = take.envelope(onsets, [(0, -60), (0.7 * gasp_s, -18), (gasp_s, -60)])
    at = gasp_s + rng.uniform(0.02, 0.15)
    burst = take.envelope(onsets, [(at, -60), (at + 0.015, 0), (at + burst_s, -12), (at + 1.8 * burst_s, -60)])
    pitch = take.pitch_hz * take.curve(onsets, [(at, 2.2), (at + burst_s, 1.1)])
    air = take.resonate(take.air(), (900 * take.tract, 700, 0.6), (rng.uniform(2500, 6000), 2500, 1))
    voice = take.resonate(take.pulses(pitch), (600 * take.tract, 250, 1), (1600 * take.tract, 300, 0.6))
    return gasp * air + burst * (air + rng.uniform(0, 0.7) * voice)


def snore(take: Take) -> np.ndarray:
    """The palate flapping at a few tens of Hz, irregularly, while breathing in; faint air while breathing out."""
    rng = take.rng
    onsets = take.onsets(3.0, 4.5)
    length_s = rng.uniform(0.9, 1.6)
    inward = take.envelope(onsets, [(0, -50), (0.3 * length_s, -3), (0.7 * length_s, 0), (length_s, -50)])
    outward = take.envelope(onsets, [(length_s + 0.2, -50), (length_s + 0.6, rng.uniform(-20, -8)), (2.9, -50)])
    flaps_hz = rng.uniform(25, 70) * 2 ** (0.4 * take.wander(8))
    flesh = ((rng.uniform(120, 300), 120, 1), (rng.uniform(400, 900), 250, 0.6), (1800 * take.tract, 600, 0.2))
    air = take.resonate(take.air(), (600 * take.tract, 500, 1), (1700 * take.tract, 900, 0.4))
    return inward * (take.resonate(take.pulses(flaps_hz), *flesh) + 0.3 * air) + outward * air


def vowel(take: Take) -> np.ndarray:
    """Speech-like: syllables of up to three vowels in turn, on a pitch that wanders."""
    onsets = take.onsets(0.22, 0.5)
    glottis = take.pulses(take.pitch_hz * 2 ** (0.2 * take.wander(1)))
    sound = np.zeros(take.num_samples)
    for turn, vowel_hz in enumerate(take.rng.permutation(VOWELS_HZ)[: min(3, len(onsets))]):
        syllable = take.envelope(onsets[turn::3], [(0, -50), (0.04, 0), (0.17, -4), (0.26, -50)])
        peaks = [(take.tract * hz, 60 + 0.05 * hz, gain) for hz, gain in zip(vowel_hz, (1, 0.5, 0.2), strict=True)]
        sound += syllable * take.resonate(glottis, *peaks)
    return sound


def tone(take: Take) -> np.ndarray:
    """Notes of a few harmonics, joined by short glides; from a held whistle to plucked beeps."""
    rng = take.rng
    onsets = take.onsets(0.35, 1.5)
    pitch = rng.uniform(150, 1200) * 2 ** take.curve(onsets, [(0, 0), (0.3, 0)], spread=0.3).clip(-0.8, 0.8)
    phase = 2 * np.pi * np.cumsum(pitch) / take.rate
    sound = sum(rng.uniform(0.1, 1) / k * np.sin(k * phase) for k in (1, 2, 3))
    return sound * take.envelope(onsets, [(0, -20), (0.02, 0), (0.34, rng.uniform(-40, 0))])


def noise(take: Take) -> np.ndarray:
    """Wind, rain or a fan: two broad bands whose level drifts."""
    rng = take.rng
    bands = [(10 ** rng.uniform(1.7, 3.6), 10 ** rng.uniform(2.5, 3.7), gain) for gain in (1, rng.uniform(0, 1))]
    return take.resonate(take.air(), *bands) * 10 ** (rng.uniform(0, 0.4) * take.wander(0.7))


SOUNDS: dict[str, Callable[[Take], np.ndarray]] = {
    "cough": cough,
    "breath": breath,
    "sneeze": sneeze,
    "snore": snore,
    "vowel": vowel,
    "tone": tone,
    "noise": noise,
}


def recording(
    label: str, rate: int, duration_s: float, rng: np.random.Generator, voice: np.random.Generator
) -> np.ndarray:
    """One sound over a background at a random level -> [n] float32, |x| <= 0.9, mono.

    Root mean square is drawn between -42 and -24 dBFS whatever the label, so loudness alone says nothing.

    Args:
        duration_s: at least 0.5, so that an event has begun.
        rng: what differs from recording to recording.
        voice: what stays within one person; pass a generator of the same address for each of their recordings.
    """
    pitch_hz, tract = 85 * 2 ** voice.uniform(0, 1.6), voice.uniform(0.95, 1.3)
    take = Take(rng, rate, round(duration_s * rate), pitch_hz, tract)
    sound = SOUNDS[label](take)
    sound /= sound.std()
    room = take.resonate(take.air(), (10 ** rng.uniform(1.7, 3.3), 10 ** rng.uniform(2.5, 3.5), 1))
    sound += 10 ** (rng.uniform(-40, 3) / 20) * room
    sound *= 10 ** (rng.uniform(-42, -24) / 20) / sound.std()
    return (sound * min(1, 0.9 / np.abs(sound).max())).astype(np.float32)


def random_duration_s(rng: np.random.Generator, shortest_s: float, longest_s: float) -> float:
    """Uniform, in steps of 20 ms: a whole number of samples at every rate, and sizes that an FFT likes."""
    return 0.02 * rng.integers(round(shortest_s / 0.02), round(longest_s / 0.02) + 1)


def encoded(samples: np.ndarray, rate: int, file_format: str) -> bytes:
    """[n] or [n, channels] float32 -> a file of that format."""
    buffer = io.BytesIO()
    soundfile.write(buffer, samples, rate, format=file_format)
    return buffer.getvalue()


def source_recording(label: str, seed: int, index: int) -> tuple[str, bytes, bytes]:
    """(key, MP3, metadata JSON) of recording `index` of the whole source: 0.5 to 12 s, in one of FORMATS."""
    video, snippet = divmod(index, RECORDINGS_PER_VIDEO)
    rng = generator(seed, "source", index)
    rate, channels, _ = FORMATS[rng.choice(len(FORMATS), p=[share for *_, share in FORMATS])]
    duration_s = random_duration_s(rng, 0.5, 12)
    samples = recording(label, rate, duration_s, rng, voice=generator(seed, "source voice", video))
    if channels == 2:
        samples = np.stack([samples, rng.uniform(0.3, 1) * np.roll(samples, rng.integers(20))], axis=1)  # [n, 2]
    key = f"synthetic-{index:07d}"
    metadata = {
        "caption": label,
        "segment_filename": f"{key}.mp3",
        "duration_ms": round(1000 * duration_s),
        "start_time_ms": 15_000 * snippet,
        "title": f"synthetic video {video}",
        "channel_follower_count": int(rng.integers(1_000_000)),
        "like_count": int(rng.integers(10_000)),
    }
    return key, encoded(samples, rate, "MP3"), json.dumps(metadata).encode()


def write_source(folder: Path, num_tars: int, recordings_per_tar: int, seed: int) -> None:
    """Write tars named and laid out like the dataset's, plus the manifest `synthetic.json`; all of them or none.

    The folder is built beside its place and renamed. If it stands there with the same manifest, nothing is done.

    Raises:
        ValueError: the folder exists and holds something else.
    """
    manifest = {"version": VERSION, "num_tars": num_tars, "recordings_per_tar": recordings_per_tar, "seed": seed}
    if folder.exists():
        check_manifest(folder, manifest)
        return
    building = folder.with_name(folder.name + ".tmp")
    if building.exists():  # a killed run left it
        shutil.rmtree(building)
    try:
        for position in range(num_tars):
            number = position + (position >= MISSING_TAR)
            write_tar(building / f"flash_20_random_snippets_{number}.tar", position, recordings_per_tar, seed)
        write_json(building / MANIFEST, manifest)
        building.rename(folder)
        fsync_folder(folder.parent)
    finally:
        if building.exists():
            shutil.rmtree(building)


def check_manifest(folder: Path, expected: dict[str, int]) -> None:
    """Raise ValueError unless the folder was written by `write_source` with these arguments."""
    path = folder / MANIFEST
    found = json.loads(path.read_text()) if path.exists() else "no manifest"
    if found != expected:
        raise ValueError(
            f"{folder} exists and holds something else\n"
            f"  found:    {found}\n"
            f"  expected: {expected}\n"
            f"  if nothing in it is needed: rm -r {folder}"
        )


def write_tar(path: Path, position: int, num_recordings: int, seed: int) -> None:
    """One tar: RUNS_PER_TAR runs of one label each, other labels in the next tar; videos do not cross runs."""
    num_videos = math.ceil(num_recordings / RECORDINGS_PER_VIDEO)
    first = position * num_videos * RECORDINGS_PER_VIDEO

    def record(i: int) -> tuple[str, bytes, bytes]:
        run = i // RECORDINGS_PER_VIDEO * RUNS_PER_TAR // num_videos
        label = list(SOUNDS)[(position * RUNS_PER_TAR + run) % len(SOUNDS)]
        return source_recording(label, seed, first + i)

    with (
        atomic_write(path) as file,
        tarfile.open(fileobj=file, mode="w", format=tarfile.USTAR_FORMAT) as tar,
        ThreadPoolExecutor() as pool,  # NumPy and the encoder release the interpreter's lock
    ):
        for key, mp3, metadata in pool.map(record, range(num_recordings)):
            for name, data in ((f"{key}.audio.mp3", mp3), (f"{key}.metadata.json", metadata)):
                member = tarfile.TarInfo(name)  # its defaults are constants: time 0, owner 0, mode 644
                member.size = len(data)
                tar.addfile(member, io.BytesIO(data))


def write_recordings(folder: Path, num_per_label: int, seed: int) -> None:
    """Write <label>-0000.flac, 1 to 10 s at 16 kHz and each of a voice of its own, and labels.csv; all or none of them.

    Shares no random numbers with `write_source` and `write_table`. Raises FileExistsError if the folder is there.
    """
    if folder.exists():
        raise FileExistsError(folder)
    building = folder.with_name(folder.name + ".tmp")
    shutil.rmtree(building, ignore_errors=True)  # what a killed run left
    lines = ["path,label"]
    for label in SOUNDS:
        for i in range(num_per_label):
            rng = generator(seed, f"recording {label}", i)
            samples = recording(label, 16_000, random_duration_s(rng, 1, 10), rng, voice=rng)
            lines.append(f"{label}-{i:04d}.flac,{label}")
            with atomic_write(building / f"{label}-{i:04d}.flac") as file:
                file.write(encoded(samples, 16_000, "FLAC"))
    with atomic_write(building / "labels.csv") as file:
        file.write(("\n".join(lines) + "\n").encode())
    building.rename(folder)
    fsync_folder(folder.parent)


def write_table(path: Path, num_per_label: int, seed: int) -> None:
    """Write a labelled evaluation table, columns audio {bytes, path}, label, group, fold 1 to 5.

    2 to 5 s of FLAC at 16 kHz a row. A group is two to four rows of one voice, and lies in one fold, so a test fold
    holds no voice that was trained on. Every fold holds every label. Shares no random numbers with `write_source`.

    Raises:
        ValueError: fewer than ten rows per label, which do not make five groups of two.
    """
    import pyarrow  # here, because the streamers that write a source need none of it
    from pyarrow import parquet

    if num_per_label < 2 * NUM_FOLDS:
        raise ValueError(f"num_per_label is {num_per_label}; {NUM_FOLDS} folds need at least {2 * NUM_FOLDS}")
    num_groups = max(NUM_FOLDS, round(num_per_label / 3))
    rows = []
    for number, label in enumerate(SOUNDS):
        for i in range(num_per_label):
            group = i * num_groups // num_per_label
            rng = generator(seed, f"table {label}", i)
            voice = generator(seed, f"table voice {label}", group)
            duration_s = random_duration_s(rng, 2, 5)
            flac = encoded(recording(label, 16_000, duration_s, rng, voice), 16_000, "FLAC")
            rows.append(
                {
                    "audio": {"bytes": flac, "path": f"{label}-{i:04d}.flac"},
                    "label": label,
                    "group": f"{label}-{group:04d}",
                    "fold": 1 + (group + number) % NUM_FOLDS,
                }
            )
    string = {"dtype": "string", "_type": "Value"}
    features = {
        "audio": {"_type": "Audio"},
        "label": string,
        "group": string,
        "fold": {"dtype": "int32", "_type": "Value"},
    }
    schema = pyarrow.schema(
        [
            ("audio", pyarrow.struct([("bytes", pyarrow.binary()), ("path", pyarrow.string())])),
            ("label", pyarrow.string()),
            ("group", pyarrow.string()),
            ("fold", pyarrow.int32()),
        ],
        metadata={"huggingface": json.dumps({"info": {"features": features}})},  # lets `datasets` decode the audio
    )
    with atomic_write(path) as file:
        parquet.write_table(pyarrow.Table.from_pylist(rows, schema), file)
