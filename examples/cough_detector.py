"""A cough detector on top of embeddings: fit it on labelled recordings, then see where in a new one somebody coughs.

    python embed_audio.py LABELLED --out labelled.parquet        # a folder that has also labels.csv: path,label
    python embed_audio.py WARD --out ward.parquet
    python examples/cough_detector.py fit labelled.parquet LABELLED/labels.csv cough.npz
    python examples/cough_detector.py score cough.npz ward.parquet night.wav night.png

One window of 2 s has one score, the log-odds of a cough; they are worth what the labels are. Not a diagnostic.
Needs matplotlib and scikit-learn: pip install .[eval]

w windows   D width of an embedding
"""

import csv
import sys

import numpy as np
import tyro
from matplotlib.figure import Figure
from pyarrow import parquet
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler


def fit(table: str, labels: str, detector: str) -> None:
    """Logistic regression of the windows on the labels of their recordings. What remains is a weight per dimension."""
    with open(labels, newline="") as file:
        is_cough = {row["path"]: row["label"] == "cough" for row in csv.DictReader(file)}
    rows = [row for row in parquet.read_table(table).to_pylist() if row["path"] in is_cough]
    model = make_pipeline(StandardScaler(), LogisticRegression(C=0.1, class_weight="balanced", max_iter=1000))
    model.fit([row["embedding"] for row in rows], [is_cough[row["path"]] for row in rows])
    scaler, regression = model.named_steps.values()
    weights = regression.coef_[0] / scaler.scale_  # [D]
    np.savez(detector, weights=weights, bias=regression.intercept_[0] - weights @ scaler.mean_)


def score(detector: str, table: str, path: str, picture: str) -> None:
    """The timeline of one recording of a table, as a picture; and its loudest suspicion in words."""
    rows = parquet.read_table(table, filters=[("path", "=", path)]).to_pydict()
    if not rows["path"]:
        sys.exit(f"{table} has no recording {path}")
    with np.load(detector) as file:  # arrays only: NumPy runs no code of a file
        scores = np.array(rows["embedding"]) @ file["weights"] + file["bias"]  # [w]
    figure = Figure(figsize=(10, 3), layout="constrained")
    axes = figure.subplots()
    axes.step(np.array(rows["start_s"]) + 1, scores, where="mid")  # at the middle of each window
    axes.axhline(0, color="grey", linewidth=0.8)
    axes.set(title=path, xlabel="seconds", ylabel="log-odds of a cough")
    figure.savefig(picture)
    first = int(np.argmax(scores))
    print(f"{path}: most like a cough from {rows['start_s'][first]:g} s on ({scores[first]:+.1f})")


if __name__ == "__main__":
    tyro.extras.subcommand_cli_from_dict({"fit": fit, "score": score}, config=(tyro.conf.PositionalRequiredArgs,))
