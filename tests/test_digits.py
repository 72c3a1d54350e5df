"""examples/digits.py: a fused model learns real data, and the command does what it says."""

from __future__ import annotations

import re
import sys

import digits
import pytest
import torch
from PIL import Image
from sklearn.svm import SVC
from support import ROOT, run_python, threads

SCRIPT = str(ROOT / "examples" / "digits.py")
PER_CLASS = 20


@pytest.fixture(autouse=True)
def _one_thread():
    """At this size a second thread wins little, and loses much where other processes want its core."""
    with threads(1):
        yield


@pytest.fixture(scope="module")
def real():
    return digits.load_data()


@pytest.fixture(scope="module")
def classify(real):
    """A classifier that never saw a generated image: images (N, 1, 8, 8) -> labels (N,)."""
    images, labels = real
    classifier = SVC(gamma=0.06).fit(images.flatten(1).numpy(), labels.numpy())
    return lambda x: torch.from_numpy(classifier.predict(x.flatten(1).numpy()))


def wanted():
    return torch.arange(digits.CLASSES).repeat_interleave(PER_CLASS)


def accuracy(classify, images):
    return (classify(images) == wanted()).double().mean().item()


def spread(images, labels):
    """How much images of one class differ: the mean over classes and pixels of the standard deviation."""
    return torch.stack([images[labels == c].std(0).mean() for c in range(digits.CLASSES)]).mean().item()


@pytest.mark.slow
def test_generated_digits_are_what_was_asked_for(real, classify):
    images, labels = real
    ema, losses = digits.train(digits.make_model(), images, labels, steps=600)
    generated = digits.sample(ema, wanted())
    assert sum(losses[-100:]) / 100 < 0.5 * losses[0]
    assert accuracy(classify, generated) >= 0.8
    # Ten averages, one a class, would be recognised too.
    assert 0.4 < spread(generated, wanted()) / spread(images, labels) < 1.5


def test_an_untrained_model_does_not_pass(classify):
    assert accuracy(classify, digits.sample(digits.make_model().eval(), wanted(), steps=2)) < 0.5


def test_the_classifier_knows_digits(real):
    images, labels = real
    classifier = SVC(gamma=0.06).fit(images[::2].flatten(1).numpy(), labels[::2].numpy())
    assert classifier.score(images[1::2].flatten(1).numpy(), labels[1::2].numpy()) > 0.97


def test_fused_and_plain_learn_the_same(real):
    fused, plain = digits.make_model(fuse=True), digits.make_model(fuse=False)
    assert "[fused]" in repr(fused)
    assert "[fused]" not in repr(plain)
    fused_losses, plain_losses = (digits.train(model, *real, steps=20, batch=16)[1] for model in (fused, plain))
    assert len(set(plain_losses)) == 20
    assert fused_losses == pytest.approx(plain_losses, rel=1e-5)


def test_help_has_examples():
    done = run_python(SCRIPT, "--help", cwd=ROOT)
    assert done.returncode == 0, done.stderr
    assert "examples:" in done.stdout
    assert "--no-fuse" in done.stdout


@pytest.mark.parametrize("options", [[], ["--no-fuse"]])
def test_the_command_runs_and_writes_a_grid(tmp_path, options):
    path = tmp_path / "grid.png"
    arguments = ["--steps", "2", "--samples", "3", "--device", "cpu", "--out", str(path), *options]
    done = run_python(SCRIPT, *arguments, cwd=tmp_path, OMP_NUM_THREADS="1")
    assert done.returncode == 0, done.stderr
    name = "plain" if options else "fused"
    assert re.fullmatch(
        rf"{name} on cpu: trained 2 steps in [\d.]+ s \(loss [\d.]+\), sampled 30 images in [\d.]+ s -> .*grid.png\n",
        done.stdout,
    )
    columns, rows = Image.open(path).size
    assert rows == columns / 3 * digits.CLASSES  # a row a class, a column a sample


@pytest.mark.parametrize("option", ["--steps", "--samples"])
def test_nothing_to_do_is_an_error(monkeypatch, capsys, option):
    monkeypatch.setattr(sys, "argv", [SCRIPT, option, "0"])
    with pytest.raises(SystemExit):
        digits.main()
    assert f"{option} 0: expected at least 1" in capsys.readouterr().err
