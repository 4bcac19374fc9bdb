"""The journal beside its files: Weights & Biases, here a stand-in for its client."""

import json
import sys
from types import SimpleNamespace

import pytest

from hear_distill import journal
from hear_distill.files import UserError
from hear_distill.journal import Journal, require_wandb
from hear_distill.runlog import read_metrics


class Client(SimpleNamespace):
    """What the module `wandb` offers of what we use; notes everything."""

    class Error(Exception):
        pass

    def __init__(self, refuses: bool = False) -> None:
        super().__init__(refuses=refuses, asked=[], told=[], ended=0)

    def Settings(self, **fields):
        return fields

    def init(self, **fields):
        if self.refuses:
            raise self.Error("no API key")
        self.asked.append(fields)
        return self

    def log(self, values, step):
        self.told.append((step, dict(values)))

    def finish(self):
        self.ended += 1


@pytest.fixture
def client(monkeypatch, tmp_path):
    def make(**fields) -> Client:
        monkeypatch.setitem(sys.modules, "wandb", Client(**fields))
        return sys.modules["wandb"]

    (tmp_path / "config.json").write_text(json.dumps({"seed": 3, "loss": {"mse": 1.0}}))
    return make


def test_what_metrics_say_is_told_to_wandb_in_the_run_of_the_same_id(client, tmp_path):
    wandb = client()
    book = Journal(tmp_path, 0, "f00d")
    book.log_step(2, {"loss": 0.5, "loss_spikes": 0.0})
    book.log(3, {"anchor_mse": 0.25})
    book.close()
    lines = [(line.pop("step"), line) for line in read_metrics(tmp_path)]
    assert wandb.told == [(step, {k: v for k, v in line.items() if k != "time"}) for step, line in lines]
    assert len(wandb.told) == 2 and wandb.ended == 1
    (asked,) = wandb.asked
    assert asked["id"] == "f00d" and asked["resume"] == "allow" and asked["dir"] == str(tmp_path)
    assert asked["config"] == {"seed": 3, "loss": {"mse": 1.0}} and asked["name"] == tmp_path.name


def test_nothing_is_told_to_wandb_unless_asked_for(client, tmp_path):
    wandb = client()
    book = Journal(tmp_path, 0)
    book.log(1, {"loss": 0.5})
    book.close()
    assert (wandb.asked, wandb.told, wandb.ended) == ([], [], 0)


def test_a_client_without_an_account_is_one_line(client, tmp_path):
    client(refuses=True)
    with pytest.raises(UserError, match=r"^--wandb: .*no API key.*WANDB_MODE=offline$"):
        Journal(tmp_path, 0, "f00d")
    assert not (tmp_path / "metrics.jsonl").exists()


def test_a_client_that_is_not_installed_is_one_line_with_the_command(monkeypatch):
    monkeypatch.setattr(journal.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"pip install wandb$"):
        require_wandb()
