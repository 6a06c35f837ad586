"""Tests of the six scripts: python -m pytest -q test_all.py. No data, network or GPU is needed.

Golden values were printed by the authors' released code, in float64, for wave(n, d, a, b) below.
"""

import ast
import dataclasses
import importlib
import inspect
import itertools
import json
import math
import multiprocessing
import os
import pickle
import random
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
import xml.etree.ElementTree
from copy import deepcopy
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch: two busy threads wait for each other

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import torchvision.transforms as T
import torchvision.transforms.functional as TF
from PIL import Image
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torchvision import datasets, models
from torchvision.transforms import InterpolationMode
from torchvision.utils import save_image

import benchmark
import care
import homomorphic
import photonics_reg
import sfrik
import simclr_essl
import simsiam_essl

HERE = Path(__file__).parent
SCRIPTS = [
    HERE / f"{name}.py"
    for name in ("simclr_essl", "simsiam_essl", "care", "sfrik", "homomorphic", "photonics_reg")
    if (HERE / f"{name}.py").exists()
]
SECOND_FORM = [SCRIPTS[0]]  # the others follow; until then each form is compared with itself
# name: why it differs between scripts
MAY_DIFFER = {
    "Config": "the method's flags",
    "PRESETS": "the paper's values",
    "QUICK": "the method's flags",
    "LEAST": "the method's flags",
    "FREE": "sfrik's fraction of the labels, which only the evaluation reads",
    "IMAGENET": "the paper's values",
    "MEAN_STD": "the paper's datasets",
    "parse_args": "the method's rules",
    "Method": "the method",
    "view_policies": "the paper's augmentation",
    "make_optimizer": "the paper's optimiser",
    "load_data": "the paper's datasets",
    "batches": "image files are streamed in simclr_essl, care and sfrik only",
    "log_epoch": "simsiam_essl warns of collapse, care measures the geometry",
    "Folder": "care's list of classes, and the images whose augmentation a chunk shares",
    "make_projector": "the paper's head",
    "KNN_K, KNN_TEMPERATURE": "the paper's protocol",
    "linear_probe": "the paper's protocol",
    "probe_views": "the paper's protocol",
    "evaluate": "what the paper measures",
    "train": "photonics has stages; homomorphic can measure the equivariance of a new encoder",
}
CPU = torch.device("cpu")


def wave(n, d, a, b):
    i, j = torch.arange(n, dtype=torch.float64)[:, None], torch.arange(d, dtype=torch.float64)
    return torch.sin(a * i + b * j + 0.1 * i * j)


@pytest.fixture(autouse=True)
def fixed_seed():
    torch.manual_seed(0)


# ------------------------------------------------------------------------------------ all scripts


def definitions(path):
    """Source of every top-level function, class and constant of a script."""
    text = path.read_text()
    sources = {}
    for node in ast.parse(text).body:
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            sources[node.name] = ast.get_source_segment(text, node)
        elif isinstance(node, ast.Assign):
            sources[ast.unparse(node.targets[0]).strip("()")] = ast.get_source_segment(text, node)
    return sources


def drift(sources):
    """Names defined in two scripts or more, and those of them whose texts differ."""
    texts = {}
    for definition in sources:
        for name, text in definition.items():
            texts.setdefault(name, []).append(text)
    shared = {name for name, versions in texts.items() if len(versions) > 1}
    return shared, {name for name in shared if len(set(texts[name])) > 1}


@pytest.mark.parametrize("second", (False, True))
def test_shared_blocks_are_identical(second):
    scripts = [path for path in SCRIPTS if (path in SECOND_FORM) == second]
    shared, different = drift([definitions(path) for path in scripts])
    assert different <= MAY_DIFFER.keys(), f"drifted apart: {different - MAY_DIFFER.keys()}"
    shared = {name for name in shared if name == "LARS" or not name.isupper() and "," not in name}
    assert len(different & shared) <= 0.3 * len(shared)


def test_shared_blocks_stand_in_the_same_order():
    scripts = [path for path in SCRIPTS if path not in SECOND_FORM]
    for one, other in itertools.combinations([definitions(path) for path in scripts], 2):
        order = [[name for name in x if name in y] for x, y in ((one, other), (other, one))]
        assert order[0] == order[1]


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.stem)
def test_sections_stand_in_order(path):
    lines = path.read_text().splitlines()
    banners = [line.split()[-1] for line in lines if line[:9] == "# " + 7 * "-"]
    if path in SECOND_FORM:
        banners = [line.split()[2] for line in lines if line.startswith("# %%")]
    own = {"care": ["PROTEINS"], "photonics_reg": ["SOLVER"]}.get(path.stem, [])
    assert banners == "CONFIG DATA AUGMENT MODEL METHOD TRAIN EVALUATE MAIN".split() + own


def test_drift_is_seen():
    sources = definitions(SCRIPTS[0])
    changed = sources | {"info_nce": sources["info_nce"].replace("/ 2", "/ 3")}
    assert drift([sources, changed]) == (sources.keys(), {"info_nce"})


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.stem)
def test_a_script_stands_alone(path):
    allowed = {"torch", "torchvision", "numpy", "PIL"} | set(sys.stdlib_module_names)
    allowed -= {path.stem for path in SCRIPTS}
    for node in ast.walk(ast.parse(path.read_text())):
        names = (
            [alias.name for alias in node.names]
            if isinstance(node, ast.Import)
            else [node.module]
            if isinstance(node, ast.ImportFrom)
            else []
        )
        assert all(name.split(".")[0] in allowed for name in names), f"line {node.lineno}: {names}"
        if isinstance(node, ast.FunctionDef) and node in ast.parse(path.read_text()).body:
            assert ast.get_docstring(node)


# a step of the main branches of every method: flags, and the shapes of the tensors of a batch
IMAGES, DIGITS, CELLS = [(8, 3, 32, 32)], [(8, 1, 28, 28)], [(8, 32, 32)]
STEPS = [
    *(
        (simclr_essl, f"--dataset patterns {flags}", IMAGES)
        for flags in (
            "",
            "--lam 0",
            "--transform jigsaw",
            "--transform hflip --crop-only",
            "--transform grayscale",
            "--transform inversion",
            "--transform blur",
            "--role invariant --transform vflip",
        )
    ),
    (simclr_essl, "--dataset folder --arch small --size 32 --small-size 16", IMAGES * 3),
    (simsiam_essl, "--dataset patterns", IMAGES),
    (simsiam_essl, "--dataset patterns --lam 0", IMAGES),
    *(
        (care, f"--dataset patterns --batch-size 8 --chunks 2 {flags}", IMAGES)
        for flags in (
            "",
            "--lam 0",
            "--base moco --queue 16",
            "--share-pair --mean-gram --equivariance-batch 4",
            "--plain-gram --contrast uniformity",
            "--contrast invariance",
            "--contrast none",
        )
    ),
    (care, "--dataset folder --arch small --size 32 --batch-size 8 --chunks 2", IMAGES * 3),
    (care, "--dataset chains --batch-size 8 --chunks 2", [(8, 50, 4)]),
    *(
        (sfrik, f"--dataset patterns --projector 64-4 {flags}", IMAGES)
        for flags in (
            "",
            "--weights 1,40,0",
            *(f"--loss {loss}" for loss in ("vicreg", "auh", "simclr", "rbf", "distance")),
        )
    ),
    (sfrik, "--dataset imagenet --arch small --size 32 --projector 64-64", IMAGES * 2),
    *(
        (homomorphic, f"--width 0.25 --group {group} --ssl {ssl}", DIGITS)
        for group in ("translation", "rotation", "scale")
        for ssl in ("homomorphic", "augmented", "supervised")
    ),
    (homomorphic, "--group translation --structure none --ssl frozen", DIGITS),
    (homomorphic, "--group scale --structure none --width 0.25", DIGITS),
    *(
        (photonics_reg, f"--arch small --mode {mode}", CELLS)
        for mode in ("simclr", "simclr+transform", "essl", "supervised")
    ),
]


class OnTheGpu(TorchDispatchMode):
    """Refuses operations on tensors elsewhere: even an index costs a copy that the host awaits."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        tensors = [x for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)]
        assert {x.device.type for x in tensors if x.ndim} <= {"cuda"}, function
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize(
    "script, flags, shapes", STEPS, ids=[f"{x.__name__} {flags}" for x, flags, _ in STEPS]
)
def test_a_step_on_a_gpu_mixes_no_devices_and_never_waits(
    script, flags, shapes, tmp_path, monkeypatch
):
    """On torch's tensors without numbers, which can be "on a GPU" on any machine.

    They refuse to mix devices, and to give the host a number. They cannot go backward.
    """
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda *how: True)
    monkeypatch.setattr(torch.cuda.amp.common, "amp_definitely_not_available", lambda: False)
    if script in SECOND:  # an order drawn on the CPU
        monkeypatch.setattr(torch, "randperm", np.random.permutation)
    config, labels = script.parse_args([*flags.split(), "--out", str(tmp_path)]), (8,)
    stage, numbers, widths = (), torch.uint8 if shapes[0][1] < 4 else torch.float32, []
    if script is photonics_reg:
        supervised = config.mode == "supervised"
        stage, labels = (config.mode, int(supervised)), (8, 400) if supervised else (8,)
    method = script.Method(config, *stage)
    for module in method.encoder.modules():
        module.register_forward_hook(lambda module, x, y: widths.append(y.dtype))
    with FakeTensorMode():
        for module in method.modules():
            for tensors in (module._parameters, module._buffers):
                for name, x in tensors.items():
                    there = x if x is None else torch.empty(x.shape, dtype=x.dtype, device="cuda")
                    parameter = isinstance(x, torch.nn.Parameter)
                    tensors[name] = torch.nn.Parameter(there) if parameter else there
        batch = [torch.empty(shape, dtype=numbers, device="cuda") for shape in shapes]
        kind = torch.int64 if labels == (8,) else torch.float32
        labels = torch.empty(labels, dtype=kind, device="cuda")
        with OnTheGpu():
            loss, terms = method(batch if len(batch) > 1 else batch[0], labels)
    assert {x.device.type for x in (loss, *terms.values())} == {"cuda"}
    assert loss.dtype == torch.float32 and torch.bfloat16 in widths


@pytest.mark.parametrize(
    "script",
    dict.fromkeys(script for script, *_ in STEPS if script is not simclr_essl),
    ids=lambda x: x.__name__,
)
def test_compile_makes_one_graph_of_a_step(script, tmp_path):
    """--compile, without the compiler behind it: no break in the graph, none for a second batch."""
    _, flags, [shape, *_] = next(step for step in STEPS if step[0] is script)
    config = script.parse_args([*flags.split(), "--out", str(tmp_path)])
    method, graphs = script.Method(config), []
    plain = deepcopy(method)
    method.compile(fullgraph=True, backend=lambda graph, inputs: graphs.append(graph) or graph)
    for seed in range(2):
        batch, losses = (255 * torch.rand(shape)).to(torch.uint8 if shape[1] < 4 else None), []
        for step in (plain, method):
            torch.manual_seed(seed)
            losses.append(step(1 + batch, torch.zeros(8, dtype=torch.int64))[0])
        losses[1].backward()
        assert torch.equal(*losses)
    assert len(graphs) == 1


@pytest.mark.parametrize("name", benchmark.SCRIPTS)
def test_benchmark_of_a_script(name, monkeypatch):
    monkeypatch.setattr(benchmark, "matmul_tflops", lambda device: 0.5)
    small = ["--dataset", "patterns", "--device", "cpu", "--batch-size", "8"]
    small += {"care": ["--chunks", "2"], "sfrik": ["--projector", "64-64"]}.get(name, [])
    if name == "photonics_reg":
        small = ["--arch", "small", "--device", "cpu", "--batch-size", "8"]
    row = benchmark.script_row(name, small, 1)
    step, network = row["step_ms"], row["forward_backward_ms"]
    assert row["step_over_network"] == step / network and row["images_per_second"] == 8000 / step
    assert row["fraction_of_matmul_peak"] == 2 * row["tflops"] > 0
    if name == "care":  # two forward passes for four
        alone = benchmark.script_row(name, [*small, "--lam", "0"], 1)
        flops = [x["tflops"] * x["step_ms"] for x in (row, alone)]
        assert flops[0] / flops[1] == pytest.approx(2, rel=0.01)


def test_benchmark_of_losses_and_bad_words(capsys):
    [row] = benchmark.loss_rows(16, (128,))
    assert all(row[f"{name} ms"] > 0 for name in benchmark.LOSSES)
    assert row["vicreg GB"] * 2**30 > 4 * 128**2 > row["sfrik L=3 GB"] * 2**30 > 4 * 16 * 128
    assert row["sfrik L=3 over vicreg"] == row["sfrik L=3 ms"] / row["vicreg ms"]
    with pytest.raises(SystemExit) as end:
        benchmark.main(["simclr"])
    assert end.value.code == 2 and capsys.readouterr().err.startswith("error: choose a script of")
    benchmark.main(["--help"])
    assert "python benchmark.py sfrik" in capsys.readouterr().out


# ---------------------------------------------------------- simclr_essl, and the frame of the second form

SECOND = [simclr_essl]
second = pytest.mark.parametrize("script", SECOND, ids=lambda script: script.__name__)
both = pytest.mark.parametrize(
    "script", [*SECOND, simsiam_essl], ids=lambda script: script.__name__
)


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """runs(script): the folder of an uninterrupted run of it, which is made once."""
    folder, done = tmp_path_factory.mktemp("runs"), {}

    def run(script):
        if script not in done:
            done[script] = folder / script.__name__
            script.main(TINY[script.__name__](done[script], "--save-every", "0"))
        return done[script]

    return run


def column(*values):
    return torch.tensor(values)[:, None, None, None]


def method_of(script, *flags, n=16):
    config = script.parse_args(TINY[script.__name__]("unused", *flags))
    torch.manual_seed(0)
    return script.Method(config), script.draw_patterns(n, 3)[0], torch.zeros(n).long()


@both
def test_knn_equals_brute_force(script):
    bank, queries = torch.randn(60, 8), torch.randn(31, 8)
    bank_labels, query_labels = torch.randint(4, (60,)), torch.randint(4, (31,))
    right = 0
    for query, label in zip(queries, query_labels):
        s = [F.cosine_similarity(query, other, dim=0).item() for other in bank]
        nearest = sorted(range(60), key=lambda i: -s[i])[:7]
        votes = [
            sum(math.exp(s[i] / 0.1) for i in nearest if bank_labels[i] == c) for c in range(4)
        ]
        right += votes.index(max(votes)) == label
    got = script.knn_accuracy(bank, bank_labels, queries, query_labels, 7, 0.1, 4)
    assert got == pytest.approx(100 * right / 31)


@both
def test_knn_weighs_its_votes(script):
    """One close neighbour of class 0 outvotes two far ones of class 1."""
    bank = torch.tensor([[1.0, 0], [0, 1], [0, 1]])
    got = script.knn_accuracy(
        bank, torch.tensor([0, 1, 1]), torch.tensor([[1.0, 0.1]]), torch.tensor([0]), 3, 0.1, 2
    )
    assert got == 100


# golden: E-SSL's schedule, 100 epochs of 10 steps, 10 of warm-up, peak 0.12
@both
def test_learning_rate_equals_the_authors(script):
    golden = {
        0: 0.0,
        5: 0.006,
        99: 0.1188,
        100: 0.12,
        101: 0.11999963445946742,
        500: 0.07041889066001583,
        999: 3.655405325764249e-07,
    }
    for step, want in golden.items():
        assert script.learning_rate(step, 1000, 100, 0.12) == pytest.approx(want, rel=1e-9)
    assert script.learning_rate(1000, 1000, 100, 0.12, 0.003) == pytest.approx(0.003)
    assert script.learning_rate(0, 10, 0, 0.5) == 0.5
    assert script.learning_rate(10, 10, 10, 0.5, 0.1) == pytest.approx(0.1)


@second
def test_lars_equals_the_authors(script):
    """Golden: the VICReg/SFRIK optimiser, 3 steps, lr 0.5, weight decay 0.01; b has one dimension."""
    p = wave(4, 3, 0.3, 0.7).requires_grad_()
    b = wave(1, 3, 0.9, 0.2)[0].requires_grad_()
    optimizer = script.LARS([p, b], 0.5, weight_decay=0.01)
    for s in range(3):
        p.grad, b.grad = wave(4, 3, 0.1 * s + 0.2, 0.4), wave(1, 3, 0.6, 0.3 + s)[0]
        optimizer.step()
    assert p.flatten().tolist() == pytest.approx(
        [
            0.0,
            0.6430967426082691,
            0.9833905127546039,
            0.29476558491561217,
            0.8892215971470072,
            0.9435784967922186,
            0.5631997853223364,
            0.9949289035137666,
            0.6726816178496587,
            0.7813218253666313,
            0.9435193270298526,
            0.23701276091330567,
        ],
        rel=1e-9,
        abs=1e-12,
    )
    assert b.tolist() == pytest.approx([0.0, -1.4899934314657473, -0.3685530105552811], rel=1e-9)
    zero = torch.zeros(2, 2, requires_grad=True)  # no ratio: a plain step
    zero.grad = torch.ones(2, 2)
    script.LARS([zero], 0.5).step()
    assert (zero == -0.5).all()


@both
def test_patterns(script):
    images, labels = script.draw_patterns(500, 1)
    assert (
        images.shape == (500, 3, 32, 32)
        and images.dtype == torch.uint8
        and labels.dtype == torch.int64
    )
    assert torch.equal(images, script.draw_patterns(500, 1)[0])
    assert not torch.equal(images, script.draw_patterns(500, 2)[0])
    assert labels.bincount().min() > 25 and len(labels.unique()) == 10
    tint = images.float().mean((2, 3))
    assert (
        (tint.amax(1) - tint.amin(1)) / tint.mean(1)
    ).max() < 0.05  # nothing to learn from colour


# golden: E-SSL CIFAR-10 code, InfoNCE at temperature 0.5: [loss, |dloss/dz1|, |dloss/dz2|]
INFO_NCE = {
    (8, 5, 0.3, 0.7, 0.35, 0.72): (1.192156737774062, 0.12262782438712605, 0.1014942545528762),
    (16, 32, 1.1, 0.2, 1.0, 0.25): (1.360161967104057, 0.06009900317481963, 0.05983954413634611),
}


@pytest.mark.parametrize("key", INFO_NCE)
def test_info_nce_equals_the_authors(key):
    n, d, a1, b1, a2, b2 = key
    z1, z2 = wave(n, d, a1, b1).requires_grad_(), wave(n, d, a2, b2).requires_grad_()
    loss = simclr_essl.info_nce(z1, z2, 0.5)
    loss.backward()
    assert (loss.item(), z1.grad.norm().item(), z2.grad.norm().item()) == pytest.approx(
        INFO_NCE[key], rel=1e-6
    )


def test_info_nce_equals_the_slow_loop():
    z1, z2 = torch.randn(2, 6, 4, dtype=torch.float64)
    cosine = [[F.cosine_similarity(a, b, dim=0) for b in z2] for a in z1]
    terms = []
    for i in range(6):
        terms.append(
            -torch.log(
                torch.exp(cosine[i][i] / 0.2) / sum(torch.exp(cosine[i][j] / 0.2) for j in range(6))
            )
        )
        terms.append(
            -torch.log(
                torch.exp(cosine[i][i] / 0.2) / sum(torch.exp(cosine[j][i] / 0.2) for j in range(6))
            )
        )
    loss = simclr_essl.info_nce(z1, z2, 0.2)
    assert loss.item() == pytest.approx(sum(terms).item() / 12, rel=1e-12)
    assert loss.item() == pytest.approx(simclr_essl.info_nce(z2, z1, 0.2).item(), rel=1e-12)
    assert simclr_essl.info_nce(z1.bfloat16(), z2.bfloat16(), 0.2).dtype == torch.float32


def test_info_nce_gradient():
    z1, z2 = torch.randn(2, 4, 3, dtype=torch.float64).requires_grad_().unbind()
    assert torch.autograd.gradcheck(lambda a, b: simclr_essl.info_nce(a, b, 0.5), (z1, z2))


def test_rotate4_turns_counter_clockwise():
    x = torch.rand(2, 3, 5, 5)
    parts = simclr_essl.rotate4(x).chunk(4)
    for k in range(4):
        assert torch.equal(parts[k], torch.rot90(x, k, (2, 3)))
    assert torch.equal(parts[1][0, 0, 0], x[0, 0, :, -1])  # the right edge comes to the top


def test_every_transformation_against_torchvision():
    x = torch.rand(2, 3, 16, 16)
    versions = {
        name: transform(x).chunk(classes)
        for name, (classes, transform, _) in simclr_essl.TRANSFORMS.items()
    }
    expected = {
        "vflip": [x, TF.vflip(x)],
        "hflip": [x, TF.hflip(x)],
        "grayscale": [x, TF.rgb_to_grayscale(x, 3)],
        "inversion": [x, TF.invert(x)],
        "rotation": [TF.rotate(x, 90 * k) for k in range(4)],
        "blur": [x] + [TF.gaussian_blur(x, k) for k in (5, 9, 15)],
    }
    for name, wanted in expected.items():
        for got, want in zip(versions[name], wanted, strict=True):
            assert torch.allclose(got, want, atol=1e-5), name
    tiles = x[0, 0].unfold(0, 8, 8).unfold(1, 8, 8).flatten(2).sum(2).flatten()
    orders = {
        tuple(v[0, 0].unfold(0, 8, 8).unfold(1, 8, 8).flatten(2).sum(2).flatten().tolist())
        for v in versions["jigsaw"]
    }
    assert len(orders) == 24 and all(sorted(o) == sorted(tiles.tolist()) for o in orders)
    assert torch.equal(versions["jigsaw"][0], x)


# augmentation


@second
@pytest.mark.parametrize("size", (16, 32, 48))
def test_crop_equals_torchvisions(script, size):
    x = torch.rand(4, 3, 40, 56)
    boxes = torch.tensor([[0.0, 0, 40, 56], [3, 10, 37, 12], [5, 41, 13, 15], [20, 2, 9, 50]])
    for image, box, got in zip(x, boxes.int().tolist(), script.crop(x, boxes, size)):
        assert torch.allclose(
            got, TF.resized_crop(image, *box, [size, size], antialias=True), atol=1e-5
        )


@second
@pytest.mark.parametrize(
    "name, theirs, values",
    (
        ("brightness", TF.adjust_brightness, (0.6, 0.8, 1.0, 1.4)),
        ("contrast", TF.adjust_contrast, (0.6, 0.8, 1.0, 1.4)),
        ("saturation", TF.adjust_saturation, (0.6, 0.8, 1.0, 1.4)),
        ("shift_hue", TF.adjust_hue, (-0.5, -0.1, 0.0, 0.4)),
        ("blur", lambda image, sigma: TF.gaussian_blur(image, 13, sigma), (0.1, 0.5, 1.0, 2.0)),
    ),
)
def test_operations_equal_torchvisions(script, name, theirs, values):
    x = torch.rand(4, 3, 32, 32)
    x[:, :, :4] = 0.3  # gray has no hue
    got = getattr(script, name)(x, column(*values))
    for image, value, g in zip(x, values, got):
        assert torch.allclose(g, theirs(image, value), atol=1e-5)


OFF = {"scale": None, "jitter": None, "flip": 0, "gray": 0}


@second
def test_flip_gray_and_solarize_equal_torchvisions(script):
    x = torch.randint(256, (6, 3, 32, 32), dtype=torch.uint8)
    for change, want in (
        ({}, x / 255),
        ({"flip": 1}, TF.hflip(x / 255)),
        ({"gray": 1}, TF.rgb_to_grayscale(x / 255, 3)),
        ({"solarize": 1}, TF.solarize(x / 255, 128 / 255)),
    ):
        assert torch.allclose(script.augment(x, 32, **OFF | change), want, atol=1e-6)
        assert torch.allclose(script.augment(x / 255, 32, **OFF | change), want, atol=1e-6)


def distance(a, b):
    """Of Kolmogorov and Smirnov, between two samples."""
    points = torch.cat([a, b]).unique()
    a, b = (torch.searchsorted(x.sort().values, points, right=True) / len(x) for x in (a, b))
    return (a - b).abs().max()


@second
def test_draws_follow_torchvisions_law(script, monkeypatch):
    """10,000 draws against as many of torchvision's own, and against uniform ones."""
    n, drawn = 10_000, {}
    for name in ("crop", "brightness", "contrast", "saturation", "shift_hue", "gaussian_blur"):
        spy = lambda x, values, *rest, name=name: drawn.update({name: values}) or x
        monkeypatch.setattr(script, name, spy)
    x = torch.rand(n, 3, 32, 32)
    script.augment(x, 32, blur=0.5)
    top, left, height, width = drawn["crop"].T
    theirs = [T.RandomResizedCrop.get_params(x[0], [0.2, 1.0], [3 / 4, 4 / 3]) for _ in range(n)]
    wanted = torch.tensor(theirs).float().T
    for got, want in zip((top, left, height, width, height * width), (*wanted, wanted[2] * wanted[3])):
        assert distance(got, want) < 0.0276  # its 0.1 % point
    assert (top + height <= 32).all() and (left + width <= 32).all() and drawn["crop"].min() >= 0
    jittered = drawn["shift_hue"].flatten() != 0
    assert jittered.float().mean() == pytest.approx(0.8, abs=0.015)
    for name, low, high in (
        ("brightness", 0.6, 1.4),
        ("contrast", 0.6, 1.4),
        ("saturation", 0.6, 1.4),
        ("shift_hue", -0.1, 0.1),
    ):
        values = drawn[name].flatten()
        assert (values[~jittered] == (name != "shift_hue")).all()  # no change
        assert distance(values[jittered], torch.linspace(low, high, n)) < 0.03, name
    sigma = drawn["gaussian_blur"].flatten()
    assert (sigma > 1e-3).float().mean() == pytest.approx(0.5, abs=0.02)
    assert distance(sigma[sigma > 1e-3], torch.linspace(0.1, 2.0, n)) < 0.035
    for name in ("flip", "gray", "solarize"):
        changed = (script.augment(x[:, :, :4, :4], 4, **OFF | {name: 0.3}) != x[:, :, :4, :4]).flatten(1)
        assert changed.any(1).float().mean() == pytest.approx(0.3, abs=0.02), name


@second
def test_jitter_comes_in_every_order(script, monkeypatch):
    calls = []
    for name in ("brightness", "contrast", "saturation", "shift_hue"):
        monkeypatch.setattr(script, name, lambda x, values, name=name: calls.append(name) or x)
    for _ in range(300):
        script.augment(torch.rand(1, 3, 4, 4), 4, scale=None)
    assert len({tuple(calls[i : i + 4]) for i in range(0, 1200, 4)}) == 24


@second
def test_draws_of_images_chunks_and_processes(script, monkeypatch):
    """Images of a batch are drawn apart, those of a chunk alike, and processes change nothing."""
    x = script.draw_patterns(1, 0)[0].expand(16, -1, -1, -1)

    def view(images, **how):
        torch.manual_seed(1)
        return script.augment(images, 24, blur=0.5, solarize=0.3, **how)

    different = lambda views: (views[:, None] != views[None]).flatten(2).any(2).sum()
    whole, chunks = view(x), view(x, share=4)
    assert different(whole) == 16 * 15
    assert different(chunks[::4]) == 4 * 3
    assert torch.equal(chunks, chunks[::4].repeat_interleave(4, 0))
    monkeypatch.setattr(script, "WORLD", 2)
    parts = []
    for rank in range(2):
        monkeypatch.setattr(script, "RANK", rank)
        parts.append(view(x[:8]))
    assert torch.equal(torch.cat(parts), whole)


# the method


def test_method_is_algorithm_1():
    method, images, labels = method_of(simclr_essl, "--lam", "0.7")
    encoder = method.encoder
    torch.manual_seed(1)
    loss, terms = method(images, labels)
    assert encoder[1].num_batches_tracked == 3  # three passes, each with statistics of its own
    torch.manual_seed(1)
    mean, std = torch.tensor(simclr_essl.MEAN_STD["patterns"])[..., None, None]
    policies = simclr_essl.view_policies(method.config)
    views = [simclr_essl.augment(images, **policy) for policy in policies]
    assert [view.shape[2] for view in views] == [32, 32, 16]
    z1, z2 = (method.projector(encoder((view - mean) / std)) for view in views[:2])
    turned = torch.cat([torch.rot90(views[2], k, (2, 3)) for k in range(4)])
    logits = method.predictor(encoder((turned - mean) / std))
    parts = [-logits.log_softmax(1)[k * 16 + i, k] for k in range(4) for i in range(16)]
    right = [logits[k * 16 + i].argmax() == k for k in range(4) for i in range(16)]
    want = simclr_essl.info_nce(z1, z2, 0.5) + 0.7 * sum(parts) / 64
    assert loss.item() == pytest.approx(want.item(), rel=1e-5)
    assert terms["equivariance"].item() == pytest.approx(sum(parts).item() / 64, rel=1e-5)
    assert terms["rotation_top1"].item() == pytest.approx(100 * sum(right).item() / 64)
    loss.backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in method.parameters())
    assert all(not term.requires_grad for term in terms.values())
    x = images.float() / 255
    assert torch.equal(method.embed(x), method.projector(encoder((x - mean) / std)))


def test_lam_0_is_simclr():
    method, images, labels = method_of(simclr_essl, "--lam", "0")
    torch.manual_seed(1)
    loss, terms = method(images, labels)
    assert method.predictor is None and terms.keys() == {"invariance", "std"}
    torch.manual_seed(1)
    z1, z2 = (method.embed(method.view(images, i)) for i in (0, 1))
    assert loss.item() == pytest.approx(simclr_essl.info_nce(z1, z2, 0.5).item(), rel=1e-5)


def test_heads_have_the_specified_layers():
    kinds = lambda net: "".join(type(layer).__name__[0] for layer in net)  # Linear, BatchNorm, ...
    cifar = simclr_essl.Method(simclr_essl.Config())
    assert kinds(cifar.projector) == "LBRLB" and kinds(cifar.predictor) == "LLRLLRL"
    assert cifar.projector[-1].weight is None and cifar.projector[1].weight is not None
    assert cifar.projector[0].bias is None and cifar.predictor[-1].out_features == 4
    assert sum(p.numel() for p in cifar.encoder.parameters()) == 11_168_832  # the authors' net
    imagenet = simclr_essl.Method(simclr_essl.parse_args(["--dataset", "imagenet"]))
    assert kinds(imagenet.projector) == "LBRLBRLB"  # 2048, 2048, 2048, 128 in the code
    assert imagenet.projector[-1].weight is not None and imagenet.projector[-1].num_features == 128
    assert kinds(imagenet.predictor) == "LLRLLRLLL"  # no ReLU after the last LayerNorm
    assert imagenet.predictor[-3].out_features == 128 and imagenet.encoder.fc(torch.ones(1)) == 1
    assert imagenet.encoder.layer1[0].bn3.weight.sum() == 0


@pytest.mark.parametrize("transform", simclr_essl.TRANSFORMS)
@pytest.mark.parametrize("role", ("predict", "invariant"))
def test_figure_1(transform, role):
    flags = ("--transform", transform, "--role", role)
    method, images, labels = method_of(simclr_essl, *flags, "--crop-only")
    classes, _, less = simclr_essl.TRANSFORMS[transform]
    for policy in method.policies:
        assert policy["size"] == 32 and "blur" not in policy.keys() - less.keys()
        assert policy["jitter"] is None and policy["flip"] == policy["gray"] == 0
    loss, terms = method(images, labels)
    assert loss.isfinite() and ("equivariance" in terms) == (role == "predict")
    pictures = images.float() / 255
    every = method.transform(pictures).unflatten(0, (classes, 16))
    if role == "predict" and classes <= 4:
        versions, target = method.versions(pictures, draw=False)
        assert torch.equal(versions, every.flatten(0, 1))
        assert target.tolist() == [k for k in range(classes) for _ in range(16)]
    versions, target = method.versions(pictures, draw=True)
    assert torch.equal(versions, torch.stack([every[k, i] for i, k in enumerate(target)]))
    drawn = torch.cat([method.versions(pictures, draw=True)[1] for _ in range(60)])
    drawn = drawn.bincount(minlength=classes) / (960 / classes)
    assert (drawn > 0.4).all() and (drawn < 1.8).all()


def test_a_jigsaw_is_predicted_of_one_drawn_order():
    for transform, passed, classes in (("jigsaw", 16, 24), ("rotation", 64, 4), ("vflip", 32, 2)):
        method, images, labels = method_of(simclr_essl, "--transform", transform)
        seen = []
        method.predictor.register_forward_hook(lambda module, x, y: seen.append(tuple(y.shape)))
        method(images, labels)
        assert seen == [(passed, classes)]


def test_an_invariance_stands_first_and_an_inversion_before_normalisation():
    method, images, labels = method_of(simclr_essl, "--transform", "inversion", "--role", "invariant")
    torch.manual_seed(2)
    got = method.view(images, 0)
    torch.manual_seed(2)
    inverted = torch.randint(2, (1, 16))[0].bool()[:, None, None, None]
    pictures = torch.where(inverted, 1 - images.float() / 255, images.float() / 255)
    assert torch.equal(got, simclr_essl.augment(pictures, **method.policies[0]))
    method, images, labels = method_of(simclr_essl, "--transform", "inversion")
    seen, (mean, std) = [], method.mean_std
    method.encoder.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    method(images, labels)
    shown, inverted = (seen[2] * std + mean).chunk(2)
    assert torch.allclose(inverted, 1 - shown, atol=1e-5) and shown.std() > 0.1


def test_views_of_the_paper_and_of_the_code():
    policies = lambda *line: simclr_essl.view_policies(simclr_essl.parse_args([*line]))
    assert policies() == [{"size": size, "scale": (0.2, 1.0)} for size in (32, 32, 16)]
    for transform, name in (("hflip", "flip"), ("grayscale", "gray"), ("blur", "blur")):
        large, _, small = policies("--transform", transform)
        assert small[name] == 0 and name not in large  # a class cannot be told from the view
        assert len(policies("--transform", transform, "--role", "invariant")) == 2
    for dataset in ("imagenet", "folder"):
        first, other, small = policies("--dataset", dataset)
        assert (first["blur"], other["blur"], small["blur"]) == (1.0, 0.1, 0.1)
        assert "solarize" not in first.keys() | small.keys() and other["solarize"] == 0.2
        assert first["scale"] == other["scale"] == (0.08, 1.0) and small["scale"] == (0.05, 0.14)
        assert (first["size"], small["size"]) == (224, 96)
        assert {policy["jitter"] for policy in (first, other, small)} == {(0.4, 0.4, 0.2, 0.1)}


def test_presets():
    config = simclr_essl.parse_args(["--dataset", "imagenet"])
    assert config.lr * config.batch_size / 256 == pytest.approx(4.8) and config.final_lr == 0.001
    assert (config.lam, config.temperature, config.warmup_epochs) == (0.4, 0.2, 10)
    assert (config.weight_decay, config.arch, config.epochs) == (1e-6, "resnet50", 100)
    small = simclr_essl.Method(simclr_essl.parse_args(["--quick"]))
    small.config.dataset = "imagenet"
    optimizer = simclr_essl.make_optimizer(small, config)
    assert isinstance(optimizer, simclr_essl.LARS) and optimizer.decay == 1e-6
    optimizer = simclr_essl.make_optimizer(small, simclr_essl.parse_args([]))
    assert type(optimizer) is torch.optim.SGD and optimizer.defaults["lr"] == pytest.approx(0.12)
    [group] = optimizer.param_groups
    assert group["weight_decay"] == 5e-4 and len(group["params"]) == len([*small.parameters()])
    config = simclr_essl.parse_args(["--dataset", "folder"])
    assert (config.arch, config.batch_size, config.size) == ("resnet18", 256, 224)
    assert simclr_essl.parse_args(["--dataset", "folder", "--size", "64"]).size == 64


@second
def test_bf16_is_for_the_backbone_only(script):
    method, images, labels = method_of(script, "--precision", "bf16")
    seen = []
    for network in method.children():
        last = [*network.modules()][-1 if network is not method.encoder else 0]
        network.register_forward_hook(lambda module, x, y: seen.append((x[0].dtype, y.dtype)))
    loss, terms = method(images, labels)
    bf16, fp32 = torch.bfloat16, torch.float32
    assert set(seen) == {(fp32, bf16), (fp32, fp32)} and seen[0] == (fp32, bf16)
    assert loss.dtype == fp32 and method.features(images / 255).dtype == fp32
    loss.backward()
    assert {p.grad.dtype for p in method.parameters()} == {fp32}


@second
def test_spread_is_one_for_uniform_and_zero_for_equal_embeddings(script):
    assert script.spread(torch.randn(2000, 64)).item() == pytest.approx(1, abs=0.02)
    assert script.spread(torch.ones(100, 64)).item() == pytest.approx(0, abs=1e-6)


# evaluation


@second
def test_features_are_those_of_eval_mode_and_leave_no_trace(script):
    method, images, labels = method_of(script, n=300)
    method(images[:64], labels[:64])
    before = {name: value.clone() for name, value in method.state_dict().items()}
    features = script.extract(method, images)
    assert features.shape == (300, 128) and not features.requires_grad and method.training
    alone = torch.cat([script.extract(method, image[None]) for image in images[:5]])
    assert torch.allclose(features[:5], alone, atol=1e-5)  # no batch statistics
    assert all(torch.equal(before[name], value) for name, value in method.state_dict().items())


@second
def test_the_probe_equals_plain_linear_layers(script):
    """torch.nn.Linear, trained step by step with the same start, order and settings."""
    features, labels = torch.randn(2, 512, 8), torch.randint(3, (512,))
    epochs, settings = iter(features), dict(lr=0.5, final_lr=0.1, weight_decay=0.01, epochs=2)
    torch.manual_seed(5)
    mean, std = script.linear_probe(
        lambda: next(epochs), labels, features[0][:50], labels[:50], probes=2, **settings
    )
    torch.manual_seed(5)
    weights = torch.empty(2, 8, 3).uniform_(-(8**-0.5), 8**-0.5)
    biases = torch.empty(2, 1, 3).uniform_(-(8**-0.5), 8**-0.5)
    orders, accuracies = [torch.rand(2, 512).argsort(1) for _ in range(2)], []
    for i in range(2):
        layer = torch.nn.Linear(8, 3)
        layer.weight.data, layer.bias.data = weights[i].T.clone(), biases[i, 0].clone()
        optimizer = torch.optim.SGD(layer.parameters(), 0.5, momentum=0.9, weight_decay=0.01)
        for step in range(4):
            rows = orders[step // 2][i][step % 2 * 256 :][:256]
            rate = 0.1 + 0.4 * (1 + math.cos(math.pi * step / 4)) / 2
            optimizer.param_groups[0]["lr"] = rate
            optimizer.zero_grad()
            F.cross_entropy(layer(features[step // 2][rows]), labels[rows]).backward()
            optimizer.step()
        right = layer(features[0][:50]).argmax(1) == labels[:50]
        accuracies.append(100 * right.float().mean().item())
    assert mean == pytest.approx(np.mean(accuracies)) and std == pytest.approx(np.std(accuracies))
    few = torch.randn(60, 8)  # fewer than a batch: every image counts
    labels = (few[:, 0] > 0).long()
    assert script.linear_probe(lambda: few, labels, few, labels, lr=1.0)[0] > 90


def test_the_probe_is_the_authors(monkeypatch):
    """Fresh crops and flips in every epoch; CIFAR's test images are enlarged by 9/8 and cut."""
    defaults = inspect.signature(simclr_essl.linear_probe).parameters
    wanted = {"lr": 30, "final_lr": 0, "weight_decay": 0, "epochs": 100, "probes": 5}
    assert {name: defaults[name].default for name in wanted} == wanted
    method, images, _ = method_of(simclr_essl, n=30)
    method.config.quick, labels, seen = False, torch.arange(30) % 3, []
    encode = method.features
    monkeypatch.setattr(method, "features", lambda V: seen.append(V) or encode(V))
    data = None, (images, labels), (images[:9], labels[:9])
    simclr_essl.probe(method, data, method.config, None, None)
    test, first, second = seen[:3]
    assert len(seen) == 101 and first.shape == second.shape == (30, 3, 32, 32)
    assert not torch.equal(first, second)
    zoomed = TF.resize(images[:9].float() / 255, [36, 36])
    assert torch.allclose(test, TF.center_crop(zoomed, [32, 32]), atol=1e-6)


@second
def test_neighbours_are_framed_in_green_and_red(script, tmp_path):
    """And fewer than eight images are enough."""
    few = [torch.zeros(3, 3, 8, 8).byte(), torch.zeros(3).long()]
    script.draw_neighbours(tmp_path / "few.png", (None, few, few), torch.eye(3), torch.eye(3))
    images = torch.full((20, 3, 32, 32), 128, dtype=torch.uint8)
    bank, labels = torch.randn(20, 4), torch.arange(20) % 2
    data = None, (images, labels), (images, torch.zeros(20).long())
    script.draw_neighbours(tmp_path / "n.png", data, bank, bank)
    picture = TF.pil_to_tensor(datasets.folder.default_loader(tmp_path / "n.png"))[:, ::2, ::2]
    queries = torch.randperm(20, generator=torch.Generator().manual_seed(0))[:8]
    for i, query in enumerate(queries):  # tiles of 36 pixels, 2 apart
        nearest = F.cosine_similarity(bank[query], bank).topk(8).indices
        corner = picture[:, 2 + 38 * i, 2 : 2 + 38 * 9 : 38].T.tolist()
        green, red, gray = [0, 179, 0], [230, 0, 0], [128, 128, 128]
        assert corner == [gray] + [red if labels[j] else green for j in nearest]


# a run, its files, its faults


@second
def test_outputs(script, runs):
    out = runs(script)
    results = json.loads((out / "results.json").read_text())
    numbers = "knn_top1 random_init_knn_top1 linear_top1 linear_top1_std train_seconds rotation_top1"
    for name in numbers.split() + ["images_per_second"]:
        assert results[name] == round(results[name], 2) >= 0, name
    words = "knn_protocol linear_protocol device torch command"
    assert all(results[name] for name in words.split()) and results["peak_memory_gb"] is None
    assert (results["epochs"], results["seed"]) == (3, 0) and results["threads"] > 0
    start, *lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert start["epoch"] == 0 and {"command", "torch", "device", "threads"} <= start.keys()
    assert [line["epoch"] for line in lines] == [1, 2, 3]
    assert lines[0]["loss"] == pytest.approx(
        lines[0]["invariance"] + 0.4 * lines[0]["equivariance"]
    )
    assert results["rotation_top1"] == round(lines[2]["rotation_top1"], 2)
    config = json.loads((out / "config.json").read_text())
    saved = torch.load(out / "checkpoint.pt", weights_only=True)
    assert config == saved["config"] and config["batch_size"] == 64
    assert saved["script"] == script.__name__ and saved["log"] == [start, *lines]
    assert saved["data"] == {
        "classes": "patterns",
        "images": [256, 256, 1000],
        "precision": "fp32",
    }
    encoder = torch.load(out / "encoder.pt", weights_only=True)
    assert all(torch.equal(encoder[k], saved["method"][f"encoder.{k}"]) for k in encoder)
    files = "checkpoint.pt config.json encoder.pt metrics.jsonl neighbours.png results.json"
    assert sorted(path.name for path in out.iterdir()) == files.split()


@second
def test_the_rate_follows_the_schedule_step_by_step(script, tmp_path, monkeypatch):
    rates, make = [], script.make_optimizer

    def spied(method, config):
        optimizer = make(method, config)
        step = optimizer.step
        optimizer.step = lambda: (rates.append(optimizer.param_groups[0]["lr"]), step())
        return optimizer

    monkeypatch.setattr(script, "make_optimizer", spied)
    script.main(TINY[script.__name__](tmp_path / "run", "--final-lr", "0.5"))
    peak, cosine = 0.2 * 64 / 256, [math.cos(math.pi * (step - 4) / 8) for step in range(12)]
    want = [peak * (step / 4 if step < 4 else (3 + cosine[step]) / 4) for step in range(12)]
    assert rates == pytest.approx(want)


@second
def test_every_step_draws_anew_and_every_epoch_follows_from_its_number(script, tmp_path, monkeypatch):
    boxes, crop = [], script.crop
    spy = lambda x, box, size: boxes.append(tuple(box.flatten().tolist())) or crop(x, box, size)
    monkeypatch.setattr(script, "crop", spy)
    line = TINY[script.__name__](tmp_path / "run")
    script.main(line)
    assert len(boxes) == 36 and len(set(boxes)) == 36
    config = script.parse_args(line)
    data = [(torch.arange(300), torch.arange(300))]
    orders = []
    for epoch in (1, 2, 1):
        torch.manual_seed(epoch)
        order = [rows.tolist() for rows, _ in script.batches(data, config, epoch, CPU)]
        assert [len(rows) for rows in order] == [64] * 4 and len(set(sum(order, []))) == 256
        orders.append(order)
    assert orders[0] == orders[2] != orders[1]


# Runs each command line in a forked child, which dies by SIGKILL at a call of a function.
KILLER_2 = """
import importlib, json, os, signal, sys
import torch
script = importlib.import_module(sys.argv[1])
script.linear_probe = lambda *args, **how: (0.0, 0.0)
for argv, name, at in json.loads(sys.argv[2]):
    if os.fork() == 0:
        owner, calls = os if name == "replace" else script, []
        original = getattr(owner, name)
        def dying(*args, **kwargs):
            calls.append(1)
            if len(calls) == at:
                os.kill(os.getpid(), signal.SIGKILL)
            return original(*args, **kwargs)
        setattr(owner, name, dying)
        script.main(argv)
        os._exit(0)
    print(os.wait()[1])
"""


def same_end(a, b):
    """Tensors, optimiser and log of two runs agree bit for bit, but for times and folders."""
    one, two = (torch.load(run / "checkpoint.pt", weights_only=True) for run in (a, b))
    buffers = [
        [x for state in saved["optimizer"]["state"].values() for x in state.values()]
        for saved in (one, two)
    ]
    logs = [
        [{k: v for k, v in line.items() if "second" not in k and k != "command"} for line in log]
        for log in (one["log"], two["log"])
    ]
    tensors = all(map(torch.equal, one["method"].values(), two["method"].values()))
    return tensors and all(map(torch.equal, *buffers)) and logs[0] == logs[1]


@second
def test_a_killed_run_ends_as_an_uninterrupted_one(script, tmp_path, runs):
    """Killed in a step, before a file is renamed, while it evaluates."""
    line, todo = TINY[script.__name__], []
    points = ("learning_rate 2", "learning_rate 11", "replace 1", "replace 2", "knn_accuracy 2")
    for point in points:
        name, at = point.split()
        argv = line(tmp_path / point, "--save-every", "0")
        todo += [(argv, name, int(at)), (argv, "replace", 99)]
    done = subprocess.run(
        [sys.executable, "-c", KILLER_2, script.__name__, json.dumps(todo)],
        cwd=HERE,
        capture_output=True,
        text=True,
    )
    codes = [int(word) for word in done.stdout.splitlines() if word.isdecimal()]
    assert codes == [signal.SIGKILL, 0] * len(points), done.stderr
    assert "2 of 3 epochs done" in done.stdout
    for point in points:
        assert same_end(runs(script), tmp_path / point), point
        names = {path.name for path in (tmp_path / point).iterdir()}
        assert {name for name in names if not name.rpartition(".")[2].isdecimal()} == {
            path.name for path in runs(script).iterdir()
        }


@second
def test_ctrl_c_ends_in_one_line(script, tmp_path, monkeypatch, capsys):
    def interrupted(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr(script, "learning_rate", interrupted)
    assert "same command" in fails(
        capsys, 130, *TINY[script.__name__](tmp_path / "run"), script=script
    )


@second
def test_what_is_not_finite_is_never_saved(script, tmp_path, monkeypatch, capsys):
    """A loss, and a finite loss's gradient, in the second epoch."""
    forward, step, calls = script.Method.forward, torch.optim.SGD.step, []

    def lost(self, *args):
        loss, terms = forward(self, *args)
        calls.append(1)
        return loss * (float("nan") if len(calls) == 6 else 1), terms

    def poisoned(self, *args):
        calls.append(1)
        if len(calls) == 6:
            self.param_groups[0]["params"][0].grad[:] = float("inf")
        return step(self, *args)

    for i, (owner, name, fault) in enumerate(
        ((script.Method, "forward", lost), (torch.optim.SGD, "step", poisoned))
    ):
        calls.clear()
        with monkeypatch.context() as patch:
            patch.setattr(owner, name, fault)
            line = TINY[script.__name__](tmp_path / f"run{i}", "--save-every", "0")
            message = fails(capsys, 1, *line, script=script)
        assert "epoch 2" in message and "--lr 0.2" in message
        saved = torch.load(tmp_path / f"run{i}" / "checkpoint.pt", weights_only=True)
        assert saved["log"][-1]["epoch"] == 1
        assert all(value.isfinite().all() for value in saved["method"].values())


@second
def test_errors_of_torch_in_one_line(script, tmp_path, monkeypatch, capsys):
    for problem, words in (
        (OSError("Caught OSError in DataLoader worker process 0.\nOSError: cannot read x"), "read x"),
        (torch.OutOfMemoryError("CUDA out of memory. Tried ..."), "--batch-size"),
        (RuntimeError("[gloo/transport/tcp/pair.cc] Connection closed by peer"), "process was lost"),
        (torch.distributed.DistNetworkError("timed out"), "process was lost"),
        (RuntimeError("DataLoader worker (pid 7) is killed by signal: Killed. "), "was lost"),
        (RuntimeError("DataLoader worker (pid(s) 7, 8) exited unexpectedly"), "was lost"),
        (RuntimeError("Bus error. ... workers are out of shared memory."), "--shm-size"),
        (OSError(28, "No space left on device"), "No space left on device"),
    ):

        def train(config):
            raise problem

        monkeypatch.setattr(script, "train", train)
        line = TINY[script.__name__](tmp_path / "run")
        assert words in fails(capsys, 1, *line, script=script)
    problem = RuntimeError("size mismatch")
    with pytest.raises(RuntimeError, match="size"):  # other faults are not hidden
        script.main(TINY[script.__name__](tmp_path / "run"))


@second
def test_a_full_disk_ends_in_one_line(script, tmp_path):
    """The limit on the size of a file lets config.json pass, but no checkpoint."""
    code = f"import resource, sys, {script.__name__} as script; "
    code += "resource.setrlimit(resource.RLIMIT_FSIZE, (100_000,) * 2); script.main(sys.argv[1:])"
    line = TINY[script.__name__](tmp_path / "run", "--save-every", "0")
    done = subprocess.run(
        [sys.executable, "-c", code, *line], cwd=HERE, capture_output=True, text=True
    )
    assert done.returncode == 1 and done.stderr.count("\n") == 1 and "File too large" in done.stderr
    assert [*(tmp_path / "run").glob("checkpoint*")] == []


@second
def test_a_finished_run_says_so_at_once(script, runs, tmp_path, monkeypatch, capsys):
    shutil.copytree(runs(script), tmp_path / "run")
    before = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "run").iterdir()}
    monkeypatch.setattr(script, "load_data", None)
    line = TINY[script.__name__](tmp_path / "run", "--save-every", "9")
    script.main([*line, "--knn-every", "1"])  # these do not matter
    results = json.loads((tmp_path / "run" / "results.json").read_text())
    printed = capsys.readouterr().out
    assert "is finished" in printed and "{" not in printed
    assert f"random_init_knn_top1  {results['random_init_knn_top1']}" in printed
    assert before == {path.name: path.stat().st_mtime_ns for path in (tmp_path / "run").iterdir()}
    monkeypatch.undo()
    (tmp_path / "run" / "results.json").unlink()
    thread = threading.Thread(target=script.main, args=(line,))  # as in a notebook
    thread.start()
    thread.join()
    again = json.loads((tmp_path / "run" / "results.json").read_text())
    assert again == results


@second
def test_another_run_in_the_folder_is_refused_and_named(script, runs, tmp_path, monkeypatch, capsys):
    shutil.copytree(runs(script), tmp_path / "run")
    line = TINY[script.__name__](tmp_path / "run")
    message = fails(capsys, 2, *line, "--lam", "0", "--seed", "3", script=script)
    assert "--lam 0.4 then, 0.0 now" in message and "--seed 0 then, 3 now" in message
    assert "epochs" not in message and "--out" in message
    (tmp_path / "run" / "results.json").unlink()
    monkeypatch.setattr(script, "precision", lambda *args: "bf16")  # as on a GPU
    assert "--precision fp32 then, bf16 now" in fails(capsys, 2, *line, script=script)
    monkeypatch.undo()
    patterns = script.draw_patterns
    monkeypatch.setattr(script, "draw_patterns", lambda n, seed: patterns(n - 10, seed))
    message = fails(capsys, 2, *line, script=script)
    assert "images [256, 256, 1000] then, [256, 256, 990] now" in message
    (tmp_path / "run" / "results.json").write_text("{}")
    (tmp_path / "run" / "checkpoint.pt").unlink()
    assert "checkpoint.pt" in fails(capsys, 2, *line, script=script)


def without_data(path):
    saved = torch.load(path, weights_only=True)
    return {name: value for name, value in saved.items() if name != "data"}


@second
def test_a_damaged_or_foreign_checkpoint_is_refused(script, runs, tmp_path, capsys):
    for name, damage in (
        ("truncated", lambda path: path.write_bytes(path.read_bytes()[:5000])),
        ("empty", lambda path: path.write_bytes(b"")),
        ("text", lambda path: path.write_text("no checkpoint")),
        ("list", lambda path: torch.save([1, 2], path)),
        ("foreign", lambda path: torch.save({"script": "x", "config": {}, "data": {}}, path)),
        ("first form", lambda path: torch.save(without_data(path), path)),
    ):
        (tmp_path / name).mkdir()
        path = tmp_path / name / "checkpoint.pt"
        shutil.copy(runs(script) / "checkpoint.pt", path)
        damage(path)
        if name in ("truncated", "first form"):  # of a finished run, too
            shutil.copy(runs(script) / "results.json", tmp_path / name)
        message = fails(capsys, 2, *TINY[script.__name__](tmp_path / name), script=script)
        assert str(path) in message and ("x.py" in message) == (name == "foreign")


BAD_2 = {
    "unknown flag": (["--learning-rate", "1"], "--learning-rate"),
    "abbreviated flag": (["--epoch", "3"], "--epoch"),
    "positional": (["cifar10"], "cifar10"),
    "unknown dataset": (["--dataset", "cifar11"], "cifar100"),
    "unknown word": (["--arch", "vgg"], "resnet18"),
    "word for a number": (["--epochs", "many"], "many"),
    "no value": (["--epochs"], "--epochs"),
    "zero epochs": (["--epochs", "0"], "--epochs is 1 to"),
    "negative lambda": (["--lam", "-1"], "--lam is 0 to"),
    "rate nan": (["--lr", "nan"], "not nan"),
    "rate inf": (["--lr", "inf"], "not inf"),
    "batch of one": (["--batch-size", "1"], "--batch-size is 2 to"),
    "batch larger than the data": (["--batch-size", "300"], "more than the 256 images"),
    "bad widths": (["--projector", "12-x"], "12-x"),
    "zero width": (["--projector", "0"], "not like 0"),
    "no device": (["--device", "tpu"], "tpu"),
    "huge seed": (["--seed", "9" * 20], "--seed is 0 to"),
    "file for a folder": (["--out", "/dev/null"], "/dev/null"),
    "no folder": (["--dataset", "folder", "--data-root", "nowhere"], "nowhere/train"),
    "a folder of the system": (["--out", "/proc/x"], "cannot write to /proc/x"),
    "no download": (["--dataset", "cifar10", "--data-root", "/dev/null/data"], "--quick"),
}


@second
@pytest.mark.parametrize("name", BAD_2)
def test_bad_input_is_one_line(script, name, tmp_path, capsys):
    flags, words = BAD_2[name]
    assert words in fails(capsys, 2, *TINY[script.__name__](tmp_path / "run"), *flags, script=script)
    if name == "no download":
        files = {"cifar10": "cifar-10-python.tar.gz", "cifar100": "cifar-100-python.tar.gz"}
        for dataset, file in files.items():
            line = ["--dataset", dataset, "--data-root", "/dev/null/data", "--out", tmp_path / "x"]
            assert file in fails(capsys, 2, *line, script=script)


def test_precedence_of_settings():
    parse = lambda line: simclr_essl.parse_args(line.split())
    assert parse("").batch_size == 512 and parse("").dataset == "cifar10"
    assert parse("--quick").dataset == "patterns" and parse("--quick").arch == "small"
    both = parse("--quick --dataset cifar10 --epochs 3 --lr 0.03")
    assert (both.dataset, both.arch, both.epochs, both.lr) == ("cifar10", "small", 3, 0.03)
    warmups = {"": 10, "--epochs 40": 10, "--epochs 5": 1, "--epochs 5 --warmup-epochs 3": 3}
    assert {line: parse(line).warmup_epochs for line in warmups} == warmups


@second
def test_a_folder_is_named_after_the_flags_given(script):
    name = script.__name__
    for line, want in (
        ("", name),
        ("--quick", f"{name}-quick"),
        ("--seed 3 --lr 0.030", f"{name}-lr=0.03-seed=3"),
        ("--lr 3e-2 --seed 3 --device cpu --save-every 1", f"{name}-lr=0.03-seed=3"),
        ("--dataset cifar100 --data-root x/y", f"{name}-dataset=cifar100"),
        ("--dataset folder --data-root x/y/", f"{name}-dataset=folder-data-root=y"),
        ("--precision fp32 --limit 1234567", f"{name}-limit=1234567-precision=fp32"),
    ):
        assert script.parse_args(line.split()).out == f"runs/{want}"
    home = script.parse_args(["--out=~/x"])
    assert home.out == os.path.expanduser("~/x")


@second
def test_help_explains_every_flag_in_groups(script, capsys):
    with pytest.raises(SystemExit) as stop:
        script.main(["--help"])
    text = capsys.readouterr().out
    assert stop.value.code == 0
    places = [text.index(f"\n{group}:\n") for group in ("data", "training", "run", "method")]
    assert places == sorted(places)
    for name, field in script.Config.__dataclass_fields__.items():
        assert f"--{name.replace('_', '-')} " in text
        assert field.metadata["help"] in " ".join(text.split())


@second
def test_time_left_is_told_early_with_what_shortens_it(script, tmp_path, monkeypatch, capsys):
    clock = itertools.count(step=1000)
    monkeypatch.setattr(script.time, "time", lambda: next(clock))
    line = TINY[script.__name__](tmp_path / "run", "--limit", "512", "--epochs", "100")
    monkeypatch.setattr(script, "write", lambda *args: sys.exit())
    with pytest.raises(SystemExit):
        script.main(line)
    [told] = [line for line in capsys.readouterr().out.splitlines() if "step" in line[:5]]
    assert told.startswith(" step 2 of 8, about ") and "day" in told and "--quick" in told


@second
def test_compile_changes_neither_names_nor_numbers(script, runs, tmp_path, monkeypatch):
    """With torch's tracer but no compiler behind it: one graph for each network and shape."""
    compiled, original = [], torch.nn.Module.compile

    def traced(module, **how):
        compiled.append(module)
        original(module, backend="eager", fullgraph=True, **how)

    monkeypatch.setattr(torch.nn.Module, "compile", traced)
    line = TINY[script.__name__](tmp_path / "run", "--save-every", "0", "--compile")
    script.main(line)
    assert len(compiled) == 3
    assert same_end(runs(script), tmp_path / "run")


@second
def test_limit_takes_the_first_of_a_shuffled_split(script):
    load = lambda line: script.load_data(script.parse_args(line.split()), CPU)
    whole, part = load("--dataset patterns"), load("--dataset patterns --limit 500")
    less = load("--dataset patterns --limit 300 --seed 4")
    assert [len(labels) for _, labels in whole] == [4000, 4000, 1000]
    assert [len(labels) for _, labels in part] == [500, 500, 1000]
    assert torch.equal(part[0][0], part[1][0]) and torch.equal(part[0][0][:300], less[0][0])
    assert not torch.equal(part[0][0], whole[0][0][:500]) and part[0][1].bincount().min() > 30


@second
def test_cifar_files(script, tmp_path, monkeypatch):
    """Small files of the same layout; torchvision's md5 check is replaced."""
    train = {f"data_batch_{i}": 60 for i in range(1, 6)}
    write_cifar(tmp_path, "cifar-10-batches-py", train | {"test_batch": 40}, "labels")
    write_cifar(tmp_path, "cifar-100-python", {"train": 250, "test": 30}, "fine_labels")
    monkeypatch.setattr(datasets.cifar, "check_integrity", lambda path, md5=None: True)
    for dataset, flags, size, counts in (
        ("cifar10", [], 32, [300, 300, 40]),
        ("cifar100", ["--size", "24"], 24, [250, 250, 30]),
    ):
        line = ["--dataset", dataset, "--data-root", str(tmp_path), *flags]
        data = script.load_data(script.parse_args(line), CPU)
        assert [len(labels) for _, labels in data] == counts
        for images, labels in data:
            assert images.shape == (len(labels), 3, size, size) and images.dtype == torch.uint8
        assert data[2][1].tolist() == [i % 10 for i in range(counts[2])]
    config, stored = script.parse_args(["--data-root", str(tmp_path)]), datasets.CIFAR10(tmp_path)
    image = script.load_data(config, CPU)[0][0][7]
    assert (image.permute(1, 2, 0).numpy() == stored.data[7]).all()


# images from a folder


FOLDER = "--dataset folder --arch small --size 48 --small-size 32 --batch-size 64 --epochs 2 "
FOLDER += "--projector 32-32 --predictor 32-32 --save-every 0 --knn-every 0 --data-root"
FOLDER = FOLDER.split()


@second
def test_a_streamed_folder(script, tmp_path, monkeypatch, capsys):
    """From end to end; stopped and continued; by the authors' probe of ImageNet."""
    tree, settings = tmp_path / "tree", []
    image_tree(tree, train__cat=80, train__dog=70, val__cat=9, val__dog=8)
    probe = script.linear_probe
    spy = lambda *args, **how: settings.append(how) or probe(*args, epochs=2, **how)
    monkeypatch.setattr(script, "linear_probe", spy)
    script.main([*FOLDER, str(tree), "--out", str(tmp_path / "whole")])
    assert f"{tree}/train: 150 images, 2 classes\n" in capsys.readouterr().out
    results = json.loads((tmp_path / "whole" / "results.json").read_text())
    assert results["knn_protocol"] == "k 150, temperature 0.1" and results["linear_top1"] is not None
    assert settings == [{"lr": 0.3, "final_lr": 0.3, "weight_decay": 1e-6}]
    rate, calls = script.learning_rate, []

    def interrupted(*args):
        calls.append(1)
        if len(calls) == 4:  # the second step of the second epoch
            raise KeyboardInterrupt
        return rate(*args)

    part = [*FOLDER, str(tree), "--out", str(tmp_path / "part")]
    with monkeypatch.context() as patch:
        patch.setattr(script, "learning_rate", interrupted)
        fails(capsys, 130, *part, script=script)
    script.main(part)
    assert "1 of 2 epochs done" in capsys.readouterr().out
    assert same_end(tmp_path / "whole", tmp_path / "part")
    script.main(part)
    assert "is finished" in capsys.readouterr().out
    image_tree(tree, train__cow=3, val__cow=1)  # the same folder, other images
    message = fails(capsys, 2, *part, script=script)
    assert "classes ['cat', 'dog'] then, ['cat', 'cow', 'dog'] now" in message
    assert "images [150, 150, 17] then, [153, 153, 18] now" in message


@second
def test_a_crop_follows_from_seed_epoch_and_image(script, tmp_path):
    image_tree(tmp_path, train__cat=9)
    config = script.parse_args([*FOLDER, str(tmp_path), "--seed", "7"])
    folder = script.load_data(config, CPU)[0][0]
    (view, other, small), label = folder[2, 3]
    assert label == 0 and [x.shape[1] for x in (view, other, small)] == [48, 48, 32]
    picture = datasets.folder.default_loader(folder.samples[3][0])
    torch.manual_seed(hash((7, 2, 3)))
    for size, scale, got in ((48, (0.08, 1), view), (48, (0.08, 1), other), (32, (0.05, 0.14), small)):
        assert torch.equal(got, TF.pil_to_tensor(T.RandomResizedCrop(size, scale)(picture)))
    assert torch.equal(view, folder[2, 3][0][0]) and not torch.equal(view, folder[1, 3][0][0])
    whole = TF.center_crop(TF.resize(picture, 48 * 8 // 7), 48)
    assert torch.equal(folder[0, 3][0][0], TF.pil_to_tensor(whole)) and len(folder[0, 3][0]) == 1
    assert len(folder[config.epochs + 1, 3][0]) == 1  # the probe's
    method = script.Method(config)
    method.policies = [{"size": policy["size"]} | OFF for policy in method.policies]
    batch = [torch.stack([x, x]) for x in (view, other, small)]
    for i in range(3):  # views that arrive cropped are not cropped again
        assert torch.allclose(method.view(batch, i), batch[i] / 255, atol=1e-5)


def gray_wave(n=40):
    y, x = np.mgrid[:n, :n] / n
    return 0.5 + 0.4 * np.sin(9 * x + 5 * y)


@second
@pytest.mark.parametrize("kind", ("png 16", "tiff 16", "tiff 16 big", "tiff 32", "tiff float", "holes"))
def test_gray_values_of_more_than_8_bits(script, kind, tmp_path):
    """16 bits by their range, those without a range of their own by the image's."""
    values, path = gray_wave(), tmp_path / ("x.png" if kind == "png 16" else "x.tif")
    want = (255 * (values - values.min()) / (values.max() - values.min())).astype(int)
    if "16" in kind:
        want, bits = (255 * values).astype(int), ">u2" if "big" in kind else "<u2"
        Image.fromarray((65535 * values).astype(bits)).save(path)
    elif kind == "tiff 32":
        Image.fromarray((1_000_000 * values - 400_000).astype(np.int32)).save(path)
    else:
        if kind == "holes":
            values[0, :3], want[0, :3] = (np.nan, np.inf, -np.inf), (0, 255, 0)
        Image.fromarray(values.astype(np.float32)).save(path)
    got = np.asarray(script.read_picture(path)).astype(int)
    assert got.shape == (40, 40, 3) and abs(got - want[..., None]).max() <= 1


@second
def test_pictures_are_read_as_a_viewer_shows_them(script, tmp_path):
    """All eight turns of EXIF; transparency over white; palettes, gray, CMYK."""
    colors = (gray_wave()[:30, :, None] * [200, 120, 250]).astype(np.uint8)
    upright = Image.fromarray(colors)
    undo = {2: 0, 3: 3, 4: 1, 5: 5, 6: 2, 7: 6, 8: 4}  # Image.Transpose that stores it with the tag
    for tag in range(1, 9):
        exif = Image.Exif()
        exif[0x0112] = tag
        stored = upright.transpose(Image.Transpose(undo[tag])) if tag > 1 else upright
        stored.save(tmp_path / "x.png", exif=exif)
        assert (np.asarray(script.read_picture(tmp_path / "x.png")) == colors).all(), tag
        stored.convert("L").save(tmp_path / "x.tif", exif=exif)  # which PIL may map into memory
        gray = np.asarray(script.read_picture(tmp_path / "x.tif"))[..., 0]
        assert (gray == np.asarray(upright.convert("L"))).all(), tag
    see_through = upright.convert("RGBA")
    see_through.putalpha(Image.fromarray(np.repeat([[0, 255]], 20, 1).repeat(30, 0).astype(np.uint8)))
    colors[:, :20] = 255
    see_through.save(tmp_path / "x.png")
    assert (np.asarray(script.read_picture(tmp_path / "x.png")) == colors).all()
    for image in (upright.convert("L"), upright.quantize(), upright.convert("1"), upright.convert("LA")):
        image.save(tmp_path / "x.png")
        want = np.asarray(image.convert("RGB"))
        assert (np.asarray(script.read_picture(tmp_path / "x.png")) == want).all(), image.mode
    upright.convert("CMYK").save(tmp_path / "x.jpg")
    assert script.read_picture(tmp_path / "x.jpg").mode == "RGB"


@second
def test_which_files_are_images(script, tmp_path, capsys):
    """What PIL opens, whatever the case of its extension; nothing that systems leave behind."""
    picture, train = Image.fromarray(np.zeros((9, 9, 3), np.uint8)), tmp_path / "train"
    names = "cat/a.JPEG cat/b.jfif cat/c.gif dog/d.webp dog/e.avif dog/f.tif dog/deep/g.png".split()
    hidden = "cat/._a.jpg cat/.ipynb_checkpoints/a.jpg __MACOSX/cat/a.jpg .trash/a.jpg cat/.DS_Store"
    others = "cat/notes.txt dog/film.mpg dog/paper.pdf dog/scan.fits dog/list dog/more".split()
    for name in names + hidden.split() + others:
        (train / name).parent.mkdir(parents=True, exist_ok=True)
        kind = {"jfif": "jpeg", "tif": "tiff"}.get(name[-4:].strip("."), name.split(".")[-1])
        if name in names:
            picture.save(train / name, format=kind.lower())
        else:
            (train / name).write_text("no picture")
    (train / "dog" / "deep" / "link").symlink_to(train / "cat")
    folder = script.Folder(train, script.parse_args([*FOLDER, str(tmp_path)]))
    found = {Path(path).relative_to(train).as_posix() for path, _ in folder.samples}
    linked = {name.replace("cat", "dog/deep/link") for name in names if "cat" in name}
    assert found == {*names} | linked and folder.classes == ["cat", "dog"]
    assert {folder[0, i][0][0].shape for i in range(10)} == {(3, 48, 48)}
    counts = "10 images, 2 classes; 7 other files ignored (.txt 2, no extension 2, .mpg 1"
    printed = capsys.readouterr().out
    assert "10 images, 2 classes; 7 other files ignored (" in printed, printed
    assert "no extension 2" in printed and ".txt 2" in printed and ".mpg 1" in printed


@second
def test_folders_that_cannot_be_evaluated_or_read(script, tmp_path, capsys):
    run = lambda root: [*FOLDER, tmp_path / root, "--out", tmp_path / f"run-{root}"]
    image_tree(tmp_path / "flat", train=70)
    script.main([str(word) for word in run("flat")])
    assert "no evaluation" in capsys.readouterr().out
    results = json.loads((tmp_path / "run-flat" / "results.json").read_text())
    assert results["knn_top1"] is None and (tmp_path / "run-flat" / "encoder.pt").exists()
    image_tree(tmp_path / "odd", train__cat=3, train__dog=3, val__cow=2, val__dog=1)
    assert "unlike: cat, cow" in fails(capsys, 2, *run("odd"), script=script)
    (tmp_path / "empty" / "train").mkdir(parents=True)
    assert "train/CLASS/" in fails(capsys, 2, *run("empty"), script=script)
    image_tree(tmp_path / "cut", train__cat=70, val__cat=3)
    damaged = tmp_path / "cut" / "val" / "cat" / "1.jpg"
    damaged.write_bytes(b"no header")
    assert str(damaged) in fails(capsys, 1, *run("cut"), script=script)
    assert not (tmp_path / "run-cut").exists()  # found before training
    damaged.unlink()
    for path in (tmp_path / "cut" / "train" / "cat").iterdir():
        path.write_bytes(path.read_bytes()[:400])
    message = fails(capsys, 1, *run("cut"), script=script)
    assert ".jpg" in message and "truncated" in message.lower()


@second
def test_a_killed_reader_ends_the_run_in_one_line(script, tmp_path, monkeypatch, capsys):
    image_tree(tmp_path, train__cat=80)

    def killing(*args):
        for child in multiprocessing.active_children():
            child.kill()
        time.sleep(0.2)
        return 0.1

    monkeypatch.setattr(script, "learning_rate", killing)
    line = [*FOLDER, tmp_path, "--out", tmp_path / "run", "--batch-size", "8"]
    assert "process was lost" in fails(capsys, 1, *line, script=script)


# several processes


@second
def test_world_size_left_over_in_the_environment(script, tmp_path):
    """Alone: one line. Empty: no processes. With the rest: it says for whom it waits, and Ctrl-C works."""
    line = [sys.executable, f"{script.__name__}.py", *TINY[script.__name__](tmp_path / "run")]
    clean = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}

    def launch(**env):
        pipe = subprocess.PIPE
        return subprocess.Popen(
            line, cwd=HERE, env=clean | env, stdout=pipe, stderr=pipe, text=True, bufsize=1
        )

    port = str(23_000 + os.getpid() % 20_000)
    alone, waits = launch(WORLD_SIZE="2"), launch(
        WORLD_SIZE="2", RANK="0", MASTER_ADDR="localhost", MASTER_PORT=port
    )
    _, problem = alone.communicate(timeout=60)
    assert alone.returncode == 2 and problem.startswith("error: WORLD_SIZE is 2")
    assert problem.count("\n") == 1
    assert waits.stdout.readline() == "waiting for 2 processes\n"
    time.sleep(1)
    waits.send_signal(signal.SIGINT)
    assert waits.wait(20) in (-signal.SIGINT, 130)
    line[2:] = ["--epochs", "0"]
    empty = launch(WORLD_SIZE="", RANK="")
    assert empty.wait(60) == 2 and "--epochs is 1" in empty.stderr.read()


@second
def test_gather_gives_ones_own_rows_the_whole_gradient(script, monkeypatch):
    monkeypatch.setattr(script, "RANK", 1)
    monkeypatch.setattr(script, "WORLD", 8)
    copies = lambda parts, z: [part.copy_(z) for part in parts]
    monkeypatch.setattr(script.dist, "all_gather", copies)
    z = torch.randn(4, 3, requires_grad=True)
    gathered = script.gather(z)
    assert torch.equal(gathered, z.detach().repeat(8, 1))
    gathered.sum().backward()
    assert (z.grad == 8).all()


# on a real GPU: python -m pytest -q -k cuda test_all.py


needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
CUDA = torch.device("cuda")


def step_on(script, device, monkeypatch, *flags):
    """(loss, gradients) of a step on fixed views, with flags, on a device."""
    method, images, labels = method_of(script, *flags)
    with torch.no_grad():
        torch.manual_seed(1)
        views = [method.view(images, i).to(device) for i in range(len(method.policies))]
    method.to(device)
    monkeypatch.setattr(method, "view", lambda images, i: views[i])
    loss, _ = method(images.to(device), labels.to(device))
    loss.backward()
    return loss.item(), [p.grad.cpu() for p in method.parameters()]


@needs_cuda
@second
def test_cuda_step_in_float32_equals_the_cpus(script, monkeypatch):
    before = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
    torch.set_float32_matmul_precision("highest")
    torch.backends.cudnn.allow_tf32 = False
    try:
        ours, theirs = (
            step_on(script, device, monkeypatch, "--precision", "fp32") for device in (CUDA, CPU)
        )
    finally:
        torch.set_float32_matmul_precision(before[0])
        torch.backends.cudnn.allow_tf32 = before[1]
    assert ours[0] == pytest.approx(theirs[0], rel=1e-4)
    for a, b in zip(ours[1], theirs[1]):
        assert (a - b).norm() <= 1e-3 * b.norm() + 1e-6


@needs_cuda
@second
def test_cuda_step_in_bf16_is_finite_and_near(script, monkeypatch):
    loss, gradients = step_on(script, CUDA, monkeypatch, "--precision", "bf16")
    assert loss == pytest.approx(step_on(script, CPU, monkeypatch)[0], rel=0.03)
    assert all(gradient.isfinite().all() for gradient in gradients)


@needs_cuda
@second
def test_cuda_step_never_synchronises(script):
    method, images, labels = method_of(script, "--precision", "bf16", n=64)
    method.to(CUDA, memory_format=torch.channels_last)
    optimizer = script.make_optimizer(method, method.config)
    data = [(images.to(CUDA), labels.to(CUDA))]
    for mode in ("default", "error"):  # the first step may
        torch.cuda.set_sync_debug_mode(mode)
        try:
            for x, y in script.batches(data, method.config, 1, CUDA) if mode == "default" else seen:
                loss, terms = method(x, y)
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
            seen = [(x, y)]
        finally:
            torch.cuda.set_sync_debug_mode("default")
    assert loss.isfinite()


@needs_cuda
@second
def test_cuda_compiled_step_has_the_same_loss(script):
    losses = []
    for compiled in (False, True):
        method, images, labels = method_of(script, "--precision", "fp32", n=64)
        method.to(CUDA)
        for network in method.children() if compiled else ():
            network.compile(dynamic=False)
        torch.manual_seed(1)
        losses.append(method(images.to(CUDA), labels.to(CUDA))[0].item())
    assert losses[0] == pytest.approx(losses[1], rel=1e-2)


@needs_cuda
@second
def test_cuda_run_is_saved_continued_and_read_on_the_cpu(script, tmp_path, monkeypatch, capsys):
    line, rate, calls = TINY[script.__name__](tmp_path / "run", "--save-every", "0"), [], []
    rate = script.learning_rate

    def interrupted(*args):
        calls.append(1)
        if len(calls) == 7:
            raise KeyboardInterrupt
        return rate(*args)

    with monkeypatch.context() as patch:
        patch.setattr(script, "learning_rate", interrupted)
        fails(capsys, 130, *line, "--device", "cuda", script=script)
    script.main([*line, "--device", "cuda"])
    assert "1 of 3 epochs done" in capsys.readouterr().out
    results = json.loads((tmp_path / "run" / "results.json").read_text())
    assert results["peak_memory_gb"] > 0 and results["device"] == torch.cuda.get_device_name()
    encoder = torch.load(tmp_path / "run" / "encoder.pt", weights_only=True)
    assert {value.device.type for value in encoder.values()} == {"cpu"}
    method, images, _ = method_of(script)
    method.encoder.load_state_dict(encoder)
    assert script.extract(method, images).isfinite().all()


# ------------------------------------------------ the first form, by simsiam_essl: goes when all have the second

def parameters(n=6, size=32, **changes):
    """Parameters that do nothing, for n square images, but for the changes."""
    return {
        "box": torch.tensor([[0.0, 0, size, size]]).repeat(n, 1),
        "flip": torch.zeros(n).bool(),
        **changes,
    }


@pytest.mark.parametrize("size", (16, 32, 48))
@pytest.mark.parametrize("mode", (InterpolationMode.BILINEAR, InterpolationMode.BICUBIC))
def test_crop_and_flip_equal_torchvision(size, mode):
    images = torch.rand(4, 3, 40, 56)
    box = torch.tensor([[0.0, 0, 40, 56], [3, 10, 37, 12], [5, 41, 13, 15], [20, 2, 9, 50]])
    flip = torch.tensor([False, True, False, True])
    got = simsiam_essl.augment(images, {"box": box, "flip": flip}, size, mode)
    for image, b, flipped, g in zip(images, box.int().tolist(), flip, got):
        want = TF.resized_crop(image, *b, [size, size], mode, antialias=True).clamp(0, 1)
        assert torch.allclose(g, TF.hflip(want) if flipped else want, atol=1e-5)


def test_uint8_and_float_images_agree():
    images = torch.randint(256, (6, 3, 32, 32), dtype=torch.uint8)
    assert torch.equal(
        simsiam_essl.augment(images, parameters(), 32),
        simsiam_essl.augment(images / 255, parameters(), 32),
    )
    assert torch.allclose(simsiam_essl.augment(images, parameters(), 32), images / 255, atol=1e-6)


@pytest.mark.parametrize(
    "kind, adjust", [(0, TF.adjust_brightness), (1, TF.adjust_contrast), (2, TF.adjust_saturation)]
)
def test_brightness_contrast_saturation_equal_torchvision(kind, adjust):
    images, factors = torch.rand(6, 3, 32, 32), torch.tensor([0.6, 0.8, 1.0, 1.1, 1.3, 1.4])
    for slot in range(6):  # before and after the shift of hue
        changes = {
            "kind": torch.full((6, 6), kind),
            "factor": torch.ones(6, 6),
            "hue": torch.zeros(6),
        }
        changes["factor"][:, slot] = factors
        got = simsiam_essl.augment(images, parameters(**changes), 32)
        for image, factor, g in zip(images, factors.tolist(), got):
            assert torch.allclose(g, adjust(image, factor), atol=1e-5)


def test_hue_equals_torchvision():
    images, hue = torch.rand(6, 3, 32, 32), torch.tensor([-0.5, -0.1, -0.03, 0.0, 0.1, 0.4])
    images[0, :, :4] = 0.3  # gray
    changes = {"kind": torch.zeros(6, 6).long(), "factor": torch.ones(6, 6), "hue": hue}
    got = simsiam_essl.augment(images, parameters(**changes), 32)
    for image, shift, g in zip(images, hue.tolist(), got):
        assert torch.allclose(g, TF.adjust_hue(image, shift), atol=1e-5)


def test_jitter_follows_the_order_of_every_image():
    policy = simsiam_essl.Policy(32, None, flip=0, gray=0)
    images = torch.rand(200, 3, 8, 8)
    drawn = simsiam_essl.draw_augmentation(200, policy, 8, 8, CPU)
    got = simsiam_essl.augment(images, drawn, 8)
    adjust = (TF.adjust_brightness, TF.adjust_contrast, TF.adjust_saturation)
    places = set()
    for image, kinds, factors, hue, g in zip(
        images, drawn["kind"], drawn["factor"], drawn["hue"], got
    ):
        for slot, (kind, factor) in enumerate(zip(kinds.tolist(), factors.tolist())):
            image = TF.adjust_hue(image, hue.item()) if slot == 3 else image
            image = adjust[kind](image, factor)
        assert torch.allclose(g, image, atol=2e-5)
        if hue != 0:
            active = [
                (slot, k)
                for slot, (k, f) in enumerate(zip(kinds.tolist(), factors.tolist()))
                if f != 1
            ]
            names = (
                [k for slot, k in active if slot < 3]
                + ["hue"]
                + [k for slot, k in active if slot > 2]
            )
            assert sorted(map(str, names)) == ["0", "1", "2", "hue"]
            places.add(tuple(names))
    assert len(places) == 24  # every order of torchvision's shuffle occurs


def test_grayscale_blur_solarize_equal_torchvision():
    images = torch.rand(6, 3, 32, 32)
    gray = torch.tensor([True, False] * 3)
    got = simsiam_essl.augment(images, parameters(gray=gray), 32)
    assert torch.allclose(got[gray], TF.rgb_to_grayscale(images[gray], 3), atol=1e-5)
    assert torch.equal(got[~gray], simsiam_essl.augment(images, parameters(), 32)[~gray])
    got = simsiam_essl.augment(images, parameters(solarize=gray), 32)
    assert torch.allclose(got[gray], TF.solarize(images[gray], 128 / 255), atol=1e-5)
    assert torch.equal(got[~gray], simsiam_essl.augment(images, parameters(), 32)[~gray])
    sigma = torch.tensor([1e-3, 0.1, 0.5, 1.0, 1.5, 2.0])
    taps = torch.exp(-0.5 * (torch.arange(-6, 7) / sigma[:, None]) ** 2)
    got = simsiam_essl.augment(images, parameters(taps=taps), 32)
    assert torch.allclose(got[0], images[0], atol=1e-5)
    for image, s, g in zip(images[1:], sigma[1:].tolist(), got[1:]):
        assert torch.allclose(g, TF.gaussian_blur(image, 13, s), atol=1e-4)


def test_draws_follow_torchvisions_law_in_the_first_form():
    """10,000 draws against as many of torchvision's own: areas, ratios, places, factors, probabilities."""
    n, policy = 10_000, simsiam_essl.Policy(32, (0.2, 1.0), blur=0.5, solarize=0.2)
    drawn = simsiam_essl.draw_augmentation(n, policy, 32, 32, CPU)
    top, left, height, width = drawn["box"].T
    image = torch.zeros(3, 32, 32)
    theirs = torch.tensor(
        [T.RandomResizedCrop.get_params(image, [0.2, 1.0], [3 / 4, 4 / 3]) for _ in range(n)]
    ).float()
    want = dict(zip(("top", "left", "height", "width"), theirs.T))
    want |= {
        "area": want["height"] * want["width"],
        "log ratio": (want["width"] / want["height"]).log(),
    }
    got = {
        "top": top,
        "left": left,
        "height": height,
        "width": width,
        "area": height * width,
        "log ratio": (width / height).log(),
    }
    for name in want:  # two-sample Kolmogorov-Smirnov distance; 0.0276 is its 0.1 % point
        values = torch.cat([got[name], want[name]]).unique()
        below = [
            torch.searchsorted(sample.sort().values, values, right=True) / n
            for sample in (got[name], want[name])
        ]
        assert (below[0] - below[1]).abs().max() < 0.0276, name
    assert (top + height <= 32).all() and (left + width <= 32).all() and (drawn["box"] >= 0).all()
    small = simsiam_essl.draw_augmentation(n, simsiam_essl.Policy(96, (0.05, 0.14)), 96, 96, CPU)[
        "box"
    ]
    share = small[:, 2] * small[:, 3] / 96**2
    assert 0.04 < share.min() < 0.06 and 0.13 < share.max() < 0.15

    jittered = drawn["hue"] != 0
    assert jittered.float().mean() == pytest.approx(0.8, abs=0.015)
    for kind in range(3):  # uniform in 0.6-1.4, by its quartiles, and 1 where nothing is jittered
        factor = torch.where(drawn["kind"] == kind, drawn["factor"], 1).prod(1)
        assert (factor[~jittered] == 1).all()
        quartiles = factor[jittered].quantile(torch.tensor([0, 0.25, 0.5, 0.75, 1]))
        assert torch.allclose(quartiles, torch.tensor([0.6, 0.8, 1.0, 1.2, 1.4]), atol=0.02)
    assert drawn["hue"][jittered].quantile(
        torch.tensor([0, 0.25, 0.75, 1])
    ).tolist() == pytest.approx([-0.1, -0.05, 0.05, 0.1], abs=0.005)
    for name, probability in {"flip": 0.5, "gray": 0.2, "solarize": 0.2}.items():
        assert drawn[name].float().mean() == pytest.approx(probability, abs=0.02)
    sigma = (-0.5 / drawn["taps"][:, 7].log()).sqrt()  # the tap one pixel from the middle
    assert (sigma > 0).float().mean() == pytest.approx(0.5, abs=0.02)
    quartiles = sigma[sigma > 0].quantile(torch.tensor([0, 0.25, 0.5, 0.75, 1]))
    assert torch.allclose(quartiles, torch.tensor([0.1, 0.575, 1.05, 1.525, 2.0]), atol=0.05)


def test_images_of_a_batch_are_drawn_apart():
    config = simsiam_essl.parse_args(["--quick"])
    method = simsiam_essl.Method(config)
    images = simsiam_essl.draw_patterns(1, 0)[0].expand(32, -1, -1, -1)
    for view in (method.view(images, 0), method.view(images, 2)):
        apart = (view[:, None] - view[None]).abs().amax((2, 3, 4)) > 0.01
        assert apart.float().sum() == 32 * 31
    drawn = simsiam_essl.draw_augmentation(64, method.policies[0]._replace(blur=1.0), 32, 32, CPU)
    assert all(len(rows.unique(dim=0)) > 1 for rows in drawn.values())


def tiny(out, *flags):
    """A command line that trains for 12 steps of 3 epochs in a second."""
    return [
        "--quick",
        "--limit",
        "256",
        "--epochs",
        "3",
        "--batch-size",
        "64",
        "--lr",
        "0.2",
        "--projector",
        "32-32",
        "--predictor",
        "32-32",
        "--warmup-epochs",
        "1",
        "--knn-every",
        "0",
        "--out",
        str(out),
        *flags,
    ]


def tiny_care(out, *flags):
    """The same for care.py, with MoCo's queue and key encoder."""
    flags = ["--base", "moco", "--queue", "100", "--chunks", "4", *flags]
    return [
        "--quick",
        "--limit",
        "256",
        "--epochs",
        "3",
        "--batch-size",
        "64",
        "--knn-every",
        "0",
    ] + [
        "--out",
        str(out),
        *flags,
    ]


def tiny_sfrik(out, *flags):
    """The same for sfrik.py."""
    line = ["--quick", "--limit", "256", "--epochs", "3", "--batch-size", "64", "--knn-every", "0"]
    return [*line, "--projector", "32-32", "--out", str(out), *flags]


def tiny_homo(out, *flags):
    """The same for homomorphic.py."""
    line = ["--quick", "--limit", "256", "--epochs", "3", "--batch-size", "64", "--knn-every", "0"]
    return [*line, "--width", "0.5", "--out", str(out), *flags]


def tiny_photonics(out, *flags):
    """The same for photonics_reg.py: 4 steps of pre-training, 6 of fine-tuning, labels beside out."""
    line = ["--quick", "--mode", "essl", "--cutoff", "1", "--limit", "32", "--test", "8"]
    line += ["--unlabelled", "64", "--batch-size", "32", "--epochs", "2", "--eval-every", "1"]
    line += ["--tune-batch-size", "16", "--tune-epochs", "3", "--splits", "1"]
    return [*line, "--data-root", str(Path(out).parent), "--out", str(out), *flags]


TINY = {
    "simclr_essl": tiny,
    "simsiam_essl": tiny,
    "care": tiny_care,
    "sfrik": tiny_sfrik,
    "homomorphic": tiny_homo,
    "photonics_reg": tiny_photonics,
}


@pytest.fixture(autouse=True)
def signal_handlers():
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


def method_and_images(*flags, n=16):
    config = simsiam_essl.parse_args(tiny("unused", *flags))
    return simsiam_essl.Method(config), simsiam_essl.draw_patterns(n, 3)[0], torch.zeros(n).long()


def test_spread_is_one_for_uniform_and_zero_for_equal_embeddings_in_the_first_form():
    assert simsiam_essl.spread(torch.randn(2000, 64)).item() == pytest.approx(1, abs=0.02)
    assert simsiam_essl.spread(torch.ones(100, 64)).item() == pytest.approx(0, abs=1e-6)


# evaluation


def test_features_are_those_of_eval_mode_and_leave_no_trace_in_the_first_form():
    method, images, labels = method_and_images(n=700)
    method(images[:64], labels[:64])
    before = {name: value.clone() for name, value in method.state_dict().items()}
    features = simsiam_essl.extract(method, images)
    assert features.shape == (700, 128) and not features.requires_grad and method.training
    alone = torch.cat([simsiam_essl.extract(method, image[None]) for image in images[:5]])
    assert torch.allclose(features[:5], alone, atol=1e-5)  # no batch statistics
    data = (
        (images, torch.arange(700) % 10),
        (images, torch.arange(700) % 10),
        (images[:77], torch.arange(77) % 10),
    )
    simsiam_essl.knn(method, data)
    simsiam_essl.rotation_accuracy(method, images[:20])
    simsiam_essl.linear_probe(features, data[0][1], features[:77], data[2][1], epochs=2)
    assert all(torch.equal(before[name], value) for name, value in method.state_dict().items())
    assert all(p.grad is None for p in method.parameters())


def test_linear_probe_learns_and_counts_every_test_image():
    centers = 3 * torch.randn(5, 16)
    labels, test_labels = torch.randint(5, (300,)), torch.randint(5, (101,))
    features, test = (
        centers[labels] + torch.randn(300, 16),
        centers[test_labels] + torch.randn(101, 16),
    )
    mean, std = simsiam_essl.linear_probe(features, labels, test, test_labels, lr=1.0, epochs=20)
    assert mean > 97 and 0 <= std < 3
    assert (mean * 101 * 5 / 100) == pytest.approx(round(mean * 101 * 5 / 100), abs=1e-3)
    calls = []
    simsiam_essl.linear_probe(
        lambda: calls.append(1) or features, labels, test, test_labels, epochs=7
    )
    assert len(calls) == 7  # fresh views once per epoch


def test_one_probe_equals_a_plain_linear_layer():
    """Against torch.nn.Linear trained step by step with the same start and order."""
    features, labels = torch.randn(512, 8), torch.randint(3, (512,))
    torch.manual_seed(5)
    mean, _ = simsiam_essl.linear_probe(
        features, labels, features[:50], labels[:50], 0.5, 3, probes=1
    )
    layer = torch.nn.Linear(8, 3)
    torch.manual_seed(5)
    layer.weight.data = torch.empty(8, 3).uniform_(-(8**-0.5), 8**-0.5).T.clone()
    layer.bias.data.uniform_(-(8**-0.5), 8**-0.5)
    optimizer = torch.optim.SGD(layer.parameters(), 0.5, momentum=0.9)
    for step in range(6):
        if step % 2 == 0:
            order = torch.rand(1, 512).argsort(1)[0]
        rows = order[step % 2 * 256 :][:256]
        optimizer.param_groups[0]["lr"] = 0.25 * (1 + math.cos(math.pi * step / 6))
        optimizer.zero_grad()
        F.cross_entropy(layer(features[rows]), labels[rows]).backward()
        optimizer.step()
    assert mean == pytest.approx(
        100 * (layer(features[:50]).argmax(1) == labels[:50]).float().mean().item()
    )


@pytest.mark.parametrize("script", (simsiam_essl,), ids=lambda script: script.__name__)
def test_transform_accuracy(script, monkeypatch):
    """An encoder that sees in which corner the light is: 100 % for it, 25 % for a blind answer."""
    method = script.Method(script.parse_args(tiny("unused")))
    measure = getattr(script, "transform_accuracy", None) or script.rotation_accuracy
    images = torch.zeros(300, 3, 32, 32, dtype=torch.uint8)
    images[:, :, :16, 16:] = 255  # top right; a quarter turn brings it to the top left

    def corners(V):
        assert V.shape[1:] == (3, 16, 16) and V.min() == 0 and V.max() == 1
        return torch.stack([V[:, 0, 3, 12], V[:, 0, 3, 3], V[:, 0, 12, 3], V[:, 0, 12, 12]], dim=1)

    monkeypatch.setattr(method, "features", corners)
    method.predictor = torch.nn.Linear(4, 4, bias=False)
    method.predictor.weight.data = torch.eye(4)
    assert measure(method, images) == 100
    method.predictor.weight.data = torch.eye(4)[[0, 0, 0, 0]]
    assert measure(method, images) == 25
    method.predictor.weight.data = torch.eye(4)[[1, 2, 3, 0]]
    assert measure(method, images) == 0


# training: a run, its files, its faults


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """An uninterrupted run."""
    out = tmp_path_factory.mktemp("finished") / "run"
    simsiam_essl.main(tiny(out, "--knn-every", "2"))
    return out


def test_outputs_in_the_first_form(finished):
    results = json.loads((finished / "results.json").read_text())
    assert results["linear_protocol"] == "5 probes, cached features"
    for name in (
        "knn_top1",
        "linear_top1",
        "linear_top1_std",
        "random_init_knn_top1",
        "epochs",
        "seed",
        "train_seconds",
        "images_per_second",
        "peak_memory_gb",
        "device",
        "torch",
        "threads",
        "command",
        "rotation_top1",
        "knn_protocol",
        "linear_protocol",
    ):
        assert name in results, name
    header, *lines = [
        json.loads(line) for line in (finished / "metrics.jsonl").read_text().splitlines()
    ]
    assert {"command", "torch", "device", "threads"} <= header.keys()
    assert [line["step"] for line in lines] == [4, 8, 12] and "knn_top1" in lines[1]
    assert lines[0]["loss"] == pytest.approx(
        lines[0]["invariance"] + 0.4 * lines[0]["equivariance"]
    )
    assert (finished / "neighbours.png").stat().st_size > 10_000
    assert json.loads((finished / "config.json").read_text())["batch_size"] == 64
    torch.load(finished / "checkpoint.pt", weights_only=True)


@pytest.mark.parametrize("script", (simsiam_essl,), ids=lambda script: script.__name__)
def test_a_run_in_bf16_is_evaluated(tmp_path, script):
    script.main(tiny(tmp_path / "run", "--precision", "bf16", "--knn-every", "1"))
    results = json.loads((tmp_path / "run" / "results.json").read_text())
    for name in ("knn_top1", "linear_top1", "rotation_top1"):
        assert results[name] is not None
    assert {value.dtype for value in torch.load(tmp_path / "run" / "encoder.pt").values()} == {
        torch.float32,
        torch.int64,
    }


def test_neighbours_are_framed_in_green_and_red_in_the_first_form(tmp_path):
    images = torch.full((20, 3, 32, 32), 128, dtype=torch.uint8)
    bank, labels = torch.randn(20, 4), torch.arange(20) % 2
    data = None, (images, labels), (images[:8], torch.zeros(8).long())
    simsiam_essl.draw_neighbours(tmp_path / "n.png", data, bank, bank[:8])
    picture = TF.pil_to_tensor(datasets.folder.default_loader(tmp_path / "n.png"))
    picture = picture[:, ::2, ::2]  # tiles of 36 pixels, 2 apart
    for i in range(8):
        nearest = F.cosine_similarity(bank[i], bank).topk(8).indices
        corner = picture[:, 2 + 38 * i, 2 : 2 + 38 * 9 : 38].T.tolist()
        green, red, gray = [0, 179, 0], [230, 0, 0], [128, 128, 128]
        assert corner == [gray] + [red if labels[j] else green for j in nearest]


def test_a_finished_run_is_not_repeated(finished, capsys):
    before = {
        path: path.stat().st_mtime_ns for path in finished.iterdir() if path.suffix != ".json"
    }
    simsiam_essl.main(tiny(finished))
    assert "is finished" in capsys.readouterr().out
    assert before == {path: path.stat().st_mtime_ns for path in before}


def test_eval_measures_a_checkpoint(finished, capsys):
    simsiam_essl.main(["--eval", str(finished / "checkpoint.pt")])
    printed = capsys.readouterr().out
    got, want = (
        json.loads(printed[printed.index("{") :]),
        json.loads((finished / "results.json").read_text()),
    )
    for name in ("knn_top1", "linear_top1", "rotation_top1", "random_init_knn_top1"):
        assert got[name] == want[name]


def test_every_step_draws_anew(tmp_path, monkeypatch):
    augment, boxes = simsiam_essl.augment, []

    def spied(images, drawn, *rest):
        boxes.append(tuple(drawn["box"].flatten().tolist()))
        return augment(images, drawn, *rest)

    monkeypatch.setattr(simsiam_essl, "augment", spied)
    simsiam_essl.main(tiny(tmp_path / "run"))
    assert len(boxes) == 3 * 14 and len(set(boxes)) == len(boxes)  # two are the forecast's


# Runs each command line in a forked child, which dies by SIGKILL at the given call of a function.
KILLER = """
import importlib, json, os, signal, sys
import torch
script = importlib.import_module(sys.argv[1])
for argv, name, at in json.loads(sys.argv[2]):
    if os.fork() == 0:
        if name:
            owner, attribute = {"step": (script, "learning_rate"), "fsync": (os, "fsync"),
                                "replace": (os, "replace")}[name]
            original, calls = getattr(owner, attribute), []
            def dying(*args, **kwargs):
                calls.append(1)
                if len(calls) == at:
                    os.kill(os.getpid(), signal.SIGKILL)
                return original(*args, **kwargs)
            setattr(owner, attribute, dying)
        script.main(argv)
        os._exit(0)
    print(os.wait()[1])
"""


def same_run(a, b):
    """Final tensors, optimiser and logged losses agree bit for bit."""
    saved = [torch.load(out / "checkpoint.pt", weights_only=True) for out in (a, b)]
    logs = [
        [
            {k: v for k, v in json.loads(line).items() if not k.endswith("_per_second")}
            for line in (out / "metrics.jsonl").read_text().splitlines()[1:]
        ]
        for out in (a, b)
    ]
    buffers = [
        [value for state in s["optimizer"]["state"].values() for value in state.values()]
        for s in saved
    ]
    return (
        logs[0] == logs[1]
        and saved[0]["state"]["step"] == saved[1]["state"]["step"]
        and all(map(torch.equal, saved[0]["method"].values(), saved[1]["method"].values()))
        and all(map(torch.equal, *buffers))
    )


# fsync and replace: while a file is written, and before it is renamed
POINTS = {
    "simsiam_essl": ["step 1", "step 3", "step 6", "step 8", "step 11", "fsync 5", "replace 9"],
    "care": ["step 6"],
    "sfrik": ["step 6"],
    "homomorphic": ["step 6"],
    "photonics_reg": ["fsync 2", "step 2", "step 5", "step 8"],  # labels, pre-training, fine-tuning
}


@pytest.mark.parametrize("script", POINTS)
def test_a_killed_run_continues_bit_for_bit(tmp_path, script):
    small = TINY[script]
    whole = small(tmp_path / "whole", "--save-every", "0")
    runs = [(whole, "", 0)]
    for point in POINTS[script]:
        argv, (name, at) = small(tmp_path / point, "--save-every", "0"), point.split()
        runs += [(argv, name, int(at)), (argv, "", 0)]
    done = subprocess.run(
        [sys.executable, "-c", KILLER, script, json.dumps(runs)],
        cwd=HERE,
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONPATH": str(HERE)},
    )
    codes = [int(line) for line in done.stdout.splitlines() if line.isdecimal()]
    assert codes == [0] + [signal.SIGKILL, 0] * len(POINTS[script]), done.stderr
    for point in POINTS[script]:
        assert same_run(tmp_path / "whole", tmp_path / point), point
    assert "continued after step" in done.stdout


@pytest.mark.parametrize("number, code", ((signal.SIGINT, 130), (signal.SIGTERM, 143)))
def test_a_signal_saves_and_the_same_command_continues(
    tmp_path, monkeypatch, capsys, finished, number, code
):
    loss, calls = simsiam_essl.negative_cosine, []

    def interrupted(*args):
        calls.append(1)
        if len(calls) == 16:  # two a step, the first two steps are the forecast's
            signal.raise_signal(number)
        return loss(*args)

    monkeypatch.setattr(simsiam_essl, "negative_cosine", interrupted)
    with pytest.raises(SystemExit) as stop:
        simsiam_essl.main(tiny(tmp_path / "run"))
    assert stop.value.code == code and "same command continues" in capsys.readouterr().err
    assert torch.load(tmp_path / "run" / "checkpoint.pt", weights_only=True)["state"]["step"] == 6
    monkeypatch.undo()
    simsiam_essl.main(tiny(tmp_path / "run"))
    saved = [
        torch.load(out / "checkpoint.pt", weights_only=True) for out in (finished, tmp_path / "run")
    ]
    assert all(map(torch.equal, saved[0]["method"].values(), saved[1]["method"].values()))


def test_another_number_of_threads_is_told_and_the_run_continues(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(
        simsiam_essl, "knn", lambda *args: signal.raise_signal(signal.SIGINT) or [50]
    )
    with pytest.raises(SystemExit):
        simsiam_essl.main(tiny(tmp_path / "run", "--knn-every", "1"))
    monkeypatch.undo()
    threads = torch.get_num_threads()
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads + 1)
    simsiam_essl.main(tiny(tmp_path / "run"))
    printed = capsys.readouterr().out
    assert f"warning: threads {threads} then, {threads + 1} now: the last digits" in printed
    assert "continued after step 4" in printed and "epoch 3/3" in printed


def test_a_signal_during_knn_saves_too(tmp_path, monkeypatch):
    monkeypatch.setattr(
        simsiam_essl, "knn", lambda *args: signal.raise_signal(signal.SIGINT) or [50]
    )
    with pytest.raises(SystemExit):
        simsiam_essl.main(tiny(tmp_path / "run", "--knn-every", "1"))
    saved = torch.load(tmp_path / "run" / "checkpoint.pt", weights_only=True)
    assert saved["state"]["step"] == 4


def fails(capsys, code, *argv, script=simsiam_essl):
    """The command ends with the exit code and one line that starts with 'error: '; returns the line."""
    with pytest.raises(SystemExit) as stop:
        script.main([str(word) for word in argv])
    lines = capsys.readouterr().err.strip().splitlines()
    assert stop.value.code == code and len(lines) == 1 and lines[0].startswith("error: "), lines
    return lines[0]


def test_a_loss_that_is_not_finite_stops_and_is_never_saved(tmp_path, monkeypatch, capsys):
    loss, calls = simsiam_essl.negative_cosine, []
    monkeypatch.setattr(
        simsiam_essl,
        "negative_cosine",
        lambda *args: calls.append(1) or loss(*args) * (float("nan") if len(calls) == 16 else 1),
    )  # two a step, the first two steps are the forecast's
    line = fails(capsys, 1, *tiny(tmp_path / "run", "--save-every", "0"))
    assert "step 6" in line and "learning rate" in line and str(tmp_path / "run") in line
    saved = torch.load(tmp_path / "run" / "checkpoint.pt", weights_only=True)
    assert saved["state"]["step"] == 5
    assert all(value.isfinite().all() for value in saved["method"].values())


def test_weights_that_are_not_finite_are_never_saved(tmp_path, monkeypatch, capsys):
    """A finite loss with a gradient that is not, in step 3."""
    step, calls = torch.optim.SGD.step, []

    def poisoned(self, *args):
        calls.append(1)
        if len(calls) == 3:
            self.param_groups[0]["params"][0].grad[:] = float("nan")
        return step(self, *args)

    monkeypatch.setattr(torch.optim.SGD, "step", poisoned)
    assert "step 3" in fails(capsys, 1, *tiny(tmp_path / "run", "--save-every", "0"))
    saved = torch.load(tmp_path / "run" / "checkpoint.pt", weights_only=True)
    assert saved["state"]["step"] == 2


@pytest.mark.parametrize("script", [name for name in TINY if name != "simclr_essl"])
def test_full_memory_names_the_batch_size(script, tmp_path, monkeypatch, capsys):
    """Of the CPU, and of a GPU, whose message is given by hand."""
    script = importlib.import_module(script)

    def full(*args):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB. GPU 0 ...")

    for function in (full, lambda *args: torch.empty(2**50)):
        monkeypatch.setattr(script, "fit", function)
        line = TINY[script.__name__](tmp_path / function.__name__)
        assert "--batch-size" in fails(capsys, 1, *line, script=script)
    monkeypatch.setattr(script, "fit", lambda *args: torch.ones(2) @ torch.ones(3))
    with pytest.raises(RuntimeError, match="size"):  # other faults are not hidden
        script.main(TINY[script.__name__](tmp_path / "other"))


def test_a_refused_command_leaves_the_folder_to_the_next(tmp_path, capsys):
    fails(capsys, 2, *tiny(tmp_path / "run", "--batch-size", "999"))
    (tmp_path / "run" / "config.json").write_text("[]")
    simsiam_essl.main(tiny(tmp_path / "run", "--epochs", "2"))
    assert json.loads((tmp_path / "run" / "config.json").read_text())["epochs"] == 2


def test_a_damaged_or_foreign_checkpoint_is_refused_in_the_first_form(tmp_path, capsys, finished):
    for name, damage in (
        ("truncated", lambda path: path.write_bytes(path.read_bytes()[:5000])),
        ("empty", lambda path: path.write_bytes(b"")),
        ("text", lambda path: path.write_text("no checkpoint")),
        ("list", lambda path: torch.save([1, 2], path)),
        ("foreign", lambda path: torch.save({"script": "care", "config": 0, "state": 0}, path)),
    ):
        out = tmp_path / name
        shutil.copytree(finished, out)
        (out / "results.json").unlink()
        damage(out / "checkpoint.pt")
        line = fails(capsys, 2, *tiny(out))
        assert str(out / "checkpoint.pt") in line
        assert ("care.py" in line) == (name == "foreign")


def test_a_full_disk_keeps_the_last_checkpoint(tmp_path):
    """The limit on the size of a file lets config.json and the log pass, but no checkpoint."""
    code = (
        "import resource, simsiam_essl, sys; resource.setrlimit(resource.RLIMIT_FSIZE, (100_000,) * 2); "
        "simsiam_essl.main(sys.argv[1:])"
    )
    simsiam_essl_run = [sys.executable, "-c", code, *tiny(tmp_path / "run", "--save-every", "0")]
    done = subprocess.run(simsiam_essl_run, cwd=HERE, capture_output=True, text=True)
    assert done.returncode == 1 and done.stderr.count("\n") == 1 and "File too large" in done.stderr
    assert not (tmp_path / "run" / "checkpoint.pt").exists()


def test_another_run_in_the_folder_is_refused_and_named_in_the_first_form(finished, capsys):
    line = fails(capsys, 2, *tiny(finished, "--lam", "0", "--seed", "3"))
    assert (
        "lam: 0.4 then, 0.0 now" in line and "seed: 0 then, 3 now" in line and "epochs" not in line
    )
    simsiam_essl.main(tiny(finished, "--knn-every", "1", "--save-every", "9"))  # these do not matter


def test_the_log_is_cut_back_on_resume(finished, tmp_path):
    shutil.copytree(finished, tmp_path / "run")
    (tmp_path / "run" / "results.json").unlink()
    log = tmp_path / "run" / "metrics.jsonl"
    kept = log.read_text()
    log.write_text(kept + "after the checkpoint")
    simsiam_essl.main(tiny(tmp_path / "run"))
    assert log.read_text() == kept


def test_an_error_is_one_line(capsys):
    """Also where torchvision's message has several, as that of MNIST's download."""
    with pytest.raises(SystemExit):
        simsiam_essl.check(False, "no mnist:\nTried A\nTried B\n")
    assert capsys.readouterr().err == "error: no mnist: Tried A Tried B\n"


def test_results_without_a_checkpoint_are_not_taken_for_another_run(finished, tmp_path, capsys):
    shutil.copytree(finished, tmp_path / "run")
    (tmp_path / "run" / "checkpoint.pt").unlink()
    assert "no checkpoint" in fails(capsys, 2, *tiny(tmp_path / "run", "--lam", "0"))


def test_a_checkpoint_of_another_version(finished, tmp_path, capsys):
    """A field that has gone is refused; one that has come since counts as its default."""
    shutil.copytree(finished, tmp_path / "run")
    (tmp_path / "run" / "results.json").unlink()
    path = tmp_path / "run" / "checkpoint.pt"
    saved = torch.load(path, weights_only=True)
    del saved["config"]["lam"]
    torch.save(saved, path)
    line = fails(capsys, 2, *tiny(tmp_path / "run", "--lam", "0.3"))
    assert "lam: 0.4 then, 0.3 now" in line
    saved["config"]["gone"] = 1
    torch.save(saved, path)
    assert str(path) in fails(capsys, 2, *tiny(tmp_path / "run"))
    assert str(path) in fails(capsys, 2, "--eval", path)


def test_the_probe_is_the_authors_by_default():
    defaults = inspect.signature(simsiam_essl.linear_probe).parameters
    assert [defaults[name].default for name in ("lr", "epochs", "probes")] == [30.0, 100, 5]


BAD_INPUT = {
    "unknown flag": ["--learning-rate", "1"],
    "abbreviated flag": ["--epoch", "3"],
    "unknown dataset": ["--dataset", "cifar11"],
    "unknown encoder": ["--arch", "vgg"],
    "unknown transformation": ["--transform", "shear"],
    "unknown role": ["--role", "both"],
    "word for a number": ["--epochs", "many"],
    "no value": ["--epochs"],
    "zero epochs": ["--epochs", "0"],
    "negative batch": ["--batch-size", "-4"],
    "zero rate": ["--lr", "0"],
    "rate nan": ["--lr", "nan"],
    "rate inf": ["--lr", "inf"],
    "negative lambda": ["--lam", "-1"],
    "negative limit": ["--limit", "-5"],
    "zero temperature": ["--temperature", "0"],
    "bad widths": ["--projector", "12-x"],
    "zero width": ["--predictor", "0"],
    "no device": ["--device", "tpu"],
    "batch larger than the data": ["--batch-size", "300"],
    "bank smaller than k": ["--limit", "100"],
    "missing checkpoint": ["--eval", "nowhere.pt"],
    "positional": ["cifar10"],
    "batch of one": ["--batch-size", "1"],
    "tiny views": ["--small-size", "4"],
    "odd jigsaw": ["--transform", "jigsaw", "--small-size", "15"],
    "odd jigsaw of large views": ["--transform", "jigsaw", "--size", "33"],
    "huge seed": ["--seed", "99999999999999999999"],
    "all warm-up": ["--warmup-epochs", "3"],
    "file for a folder": ["--out", "/dev/null"],
    "no folder": ["--dataset", "imagenet", "--data-root", "nowhere"],
    "no download": ["--dataset", "cifar10", "--data-root", "/dev/null/data"],
    "streamed invariance": ["--dataset", "imagenet", "--role", "invariant"],
}


MENTIONS = {
    "unknown flag": "--learning-rate",
    "abbreviated flag": "--epoch 3",
    "unknown dataset": "cifar11",
    "unknown encoder": "vgg",
    "unknown transformation": "shear",
    "unknown role": "both",
    "word for a number": "many",
    "no value": "--epochs",
    "zero epochs": "--epochs is 1 to",
    "negative batch": "--batch-size is 2 to",
    "zero rate": "--lr is 1e-09 to",
    "rate nan": "not nan",
    "rate inf": "not inf",
    "negative lambda": "--lam is 0 to",
    "negative limit": "--limit is 0 to",
    "zero temperature": "--temperature is 1e-09 to",
    "bad widths": "12-x",
    "zero width": "not like 0",
    "no device": "tpu",
    "batch larger than the data": "--batch-size 300",
    "bank smaller than k": "200 labelled training images, not 100",
    "missing checkpoint": "nowhere.pt",
    "positional": "cifar10",
    "batch of one": "--batch-size is 2 to",
    "tiny views": "--small-size is 8 to",
    "odd jigsaw": "even",
    "odd jigsaw of large views": "even --size",
    "huge seed": "--seed is 0 to",
    "all warm-up": "--warmup-epochs 3 must be fewer",
    "file for a folder": "/dev/null",
    "no folder": "nowhere",
    "no download": "cifar-10-python.tar.gz there, or try --quick",
    "streamed invariance": "streamed",
}


ONLY_SIMCLR = {"--transform", "--role", "--temperature", "imagenet"}


@pytest.mark.parametrize(
    "name, script",
    [(name, simsiam_essl) for name in BAD_INPUT if not ONLY_SIMCLR & set(BAD_INPUT[name])],
)
def test_bad_input(script, name, tmp_path, capsys):
    flags = BAD_INPUT[name]
    base = [] if "--eval" in flags else tiny(tmp_path / "run")
    if "--limit" in flags:
        base += ["--batch-size", "32"]
    line = fails(capsys, 2, *base, *flags, script=script)
    assert MENTIONS[name] in line


CARE_BAD = {
    "chunks that do not cut the batch": (["--chunks", "5"], "5 --chunks"),
    "chunks of one image": (["--chunks", "64"], "64 --chunks"),
    "a queue smaller than the batch": (["--queue", "10"], "--queue"),
    "MoCo with another contrast": (["--contrast", "uniformity"], "InfoNCE"),
    "no list of classes": (["--dataset", "folder", "--classes", "nowhere.txt"], "nowhere.txt"),
    "no chains": (["--dataset", "proteins", "--data-root", "nowhere"], "--dataset chains"),
    "an equivariance batch over the batch": (["--equivariance-batch", "128"], "128"),
    "a negative lambda": (["--lam", "-1"], "--lam is 0 to"),
    "a momentum of 5": (["--key-momentum", "5"], "momentum"),
    "classes of CIFAR": (["--classes", "x.txt"], "--classes"),
    "an unknown base": (["--base", "byol"], "byol"),
    "bad widths": (["--projector", "x"], "like x"),
}


@pytest.mark.parametrize("name", CARE_BAD)
def test_cares_bad_input(name, tmp_path, capsys):
    flags, word = CARE_BAD[name]
    line = [
        flag for flag in tiny_care(tmp_path / "run") if flag != "--quick" or "chains" not in word
    ]
    assert word in fails(capsys, 2, *line, *flags, script=care)


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without CUDA")
def test_cuda_where_there_is_none(tmp_path, capsys):
    assert "cuda" in fails(capsys, 2, *tiny(tmp_path / "run", "--device", "cuda"))


def test_eval_refuses_other_settings(finished, capsys):
    assert "lr" in fails(capsys, 2, "--eval", finished / "checkpoint.pt", "--lr", "1")


def test_bad_input_in_a_process_of_its_own(tmp_path):
    done = subprocess.run(
        [sys.executable, "simsiam_essl.py", "--dataset", "cifar11"],
        cwd=HERE,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 2 and done.stdout == "" and done.stderr.startswith("error: ")
    assert done.stderr.count("\n") == 1 and "cifar100" in done.stderr


def test_precedence_of_settings_in_the_first_form():
    parse = simsiam_essl.parse_args
    assert parse([]).batch_size == 512 and parse([]).dataset == "cifar10"
    assert parse(["--dataset", "stl10"]).size == 64
    assert parse(["--quick"]).dataset == "patterns" and parse(["--quick"]).arch == "small"
    both = parse(["--quick", "--dataset", "cifar10", "--epochs", "3"])
    assert (both.dataset, both.arch, both.epochs) == ("cifar10", "small", 3)
    warmup = lambda *line: parse(line).warmup_epochs
    assert warmup() == 10 and warmup("--epochs", "40") == 10 and warmup("--epochs", "5") == 1
    assert warmup("--epochs", "5", "--warmup-epochs", "3") == 3 and warmup("--epochs", "1") == 0
    assert parse(["--lr", "0.03", "--lam", "0"]).lr == 0.03


def test_different_runs_get_different_folders():
    lines = (
        [],
        ["--quick"],
        ["--lam", "0"],
        ["--lam", "0.2"],
        ["--seed", "1"],
        ["--limit", "9000"],
        ["--dataset", "patterns"],
        ["--dataset", "cifar100"],
        ["--lam", "0", "--lr", "0.03"],
        ["--quick", "--lam", "0"],
        ["--arch", "small"],
        ["--precision", "fp32"],
    )
    assert len({simsiam_essl.parse_args(line).out for line in lines}) == len(lines)
    assert simsiam_essl.parse_args(["--device", "cpu"]).out == simsiam_essl.parse_args([]).out
    ordered = simsiam_essl.parse_args(["--lam", "0", "--lr", "0.1"]).out
    assert simsiam_essl.parse_args(["--lr", "0.1", "--lam", "0"]).out == ordered


def test_help_explains_every_flag(capsys):
    with pytest.raises(SystemExit) as stop:
        simsiam_essl.main(["--help"])
    text = " ".join(capsys.readouterr().out.split())
    assert stop.value.code == 0
    for name, field in simsiam_essl.Config.__dataclass_fields__.items():
        assert (
            f"--{name.replace('_', '-')} " in text
            and " ".join(field.metadata["help"].split()) in text
        )


# data


def test_batches_are_a_permutation_drawn_anew_each_epoch():
    config = simsiam_essl.parse_args(tiny("unused"))
    train = [(torch.arange(300), torch.arange(300))]
    epochs = [
        [images.tolist() for images, _ in simsiam_essl.batches(train, config, epoch, 0, CPU)]
        for epoch in (0, 1, 0)
    ]
    assert epochs[0] == epochs[2] != epochs[1]
    for epoch in epochs:
        assert [len(batch) for batch in epoch] == [64] * 4 and len(set(sum(epoch, []))) == 256
    rest = [images.tolist() for images, _ in simsiam_essl.batches(train, config, 0, 3, CPU)]
    assert rest == epochs[0][3:]  # a resume inside the epoch
    other = simsiam_essl.parse_args(tiny("unused", "--seed", "1"))
    assert next(simsiam_essl.batches(train, other, 0, 0, CPU))[0].tolist() != epochs[0][0]


def test_limit_takes_the_first_of_a_shuffled_split_in_the_first_form(tmp_path):
    parse = lambda *flags: simsiam_essl.load_data(
        simsiam_essl.parse_args(["--dataset", "patterns", *flags]), CPU
    )
    whole, part, less = parse(), parse("--limit", "500"), parse("--limit", "300", "--seed", "4")
    assert (
        len(whole[0][1]) == len(whole[1][1]) == 4000 and len(whole[2][1]) == len(part[2][1]) == 1000
    )
    assert torch.equal(part[0][0], part[1][0]) and torch.equal(part[0][0][:300], less[0][0])
    assert not torch.equal(part[0][0], whole[0][0][:500]) and part[0][1].bincount().min() > 30


def write_cifar(root, folder, names, key):
    (root / folder).mkdir(parents=True)
    for name, n in names.items():
        content = {
            "data": torch.randint(256, (n, 3072)).byte().numpy(),
            key: [i % 10 for i in range(n)],
        }
        (root / folder / name).write_bytes(pickle.dumps(content))
    for meta, classes in (("batches.meta", "label_names"), ("meta", "fine_label_names")):
        (root / folder / meta).write_bytes(pickle.dumps({classes: list("abcdefghij")}))


def test_cifar_and_stl10_files(tmp_path, monkeypatch):
    """Small files of the same layout; torchvision's md5 check is replaced."""
    write_cifar(
        tmp_path,
        "cifar-10-batches-py",
        {**{f"data_batch_{i}": 60 for i in range(1, 6)}, "test_batch": 40},
        "labels",
    )
    write_cifar(tmp_path, "cifar-100-python", {"train": 250, "test": 30}, "fine_labels")
    stl = tmp_path / "stl10_binary"
    stl.mkdir()
    for split, n in (("train", 210), ("test", 20), ("unlabeled", 50)):
        np.random.default_rng(0).integers(0, 256, n * 3 * 96 * 96, dtype=np.uint8).tofile(
            stl / f"{split}_X.bin"
        )
        if split != "unlabeled":
            (np.arange(n) % 10 + 1).astype(np.uint8).tofile(stl / f"{split}_y.bin")
    (stl / "class_names.txt").write_text("\n".join("abcdefghij"))
    (stl / "fold_indices.txt").write_text("0\n")
    monkeypatch.setattr(datasets.STL10, "_check_integrity", lambda self: True)
    monkeypatch.setattr(datasets.cifar, "check_integrity", lambda path, md5=None: True)
    for dataset, size, counts in (
        ("cifar10", 32, (300, 300, 40)),
        ("cifar100", 32, (250, 250, 30)),
        ("stl10", 64, (260, 210, 20)),
    ):
        config = simsiam_essl.parse_args(["--dataset", dataset, "--data-root", str(tmp_path)])
        data = simsiam_essl.load_data(config, CPU)
        assert tuple(len(labels) for _, labels in data) == counts
        for images, labels in data:
            assert images.shape == (len(labels), 3, size, size) and images.dtype == torch.uint8
        assert data[2][1].tolist() == [i % 10 for i in range(counts[2])]
    line = ["--dataset", "stl10", "--data-root", str(tmp_path), "--arch", "small", "--plain-gram"]
    config = care.parse_args(line)  # crops out of 96 pixels, everything else at 32
    data = care.load_data(config, CPU)
    assert [tuple(x.shape) for x, _ in data] == [
        (n, 3, s, s) for n, s in ((260, 96), (210, 32), (20, 32))
    ]
    loss, _ = care.Method(config)(data[0][0][:16], data[0][1][:16])
    assert loss.isfinite()
    stored = datasets.CIFAR10(tmp_path, True)
    config = simsiam_essl.parse_args(["--data-root", str(tmp_path)])
    assert (
        simsiam_essl.load_data(config, CPU)[0][0][7].permute(1, 2, 0).numpy() == stored.data[7]
    ).all()


def image_tree(root, **counts):
    """JPEG files of odd sizes: image_tree(root, train__cat=3) writes root/train/cat/0.jpg to 2.jpg."""
    for i, (folder, n) in enumerate(counts.items()):
        path = root / folder.replace("__", "/")
        path.mkdir(parents=True)
        for j, image in enumerate(simsiam_essl.draw_patterns(n, i)[0].float() / 255):
            save_image(F.interpolate(image[None], (60 + j % 7, 90)), path / f"{j}.jpg")


# several processes, other libraries


TWO = """
import importlib, os, sys, torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel
script = importlib.import_module(sys.argv[1])
if "RANK" in os.environ:
    dist.init_process_group("gloo")
kind = "gpm" if hasattr(script, "draw_cells") else "patterns"
config = script.parse_args(["--dataset", kind, "--batch-size", "32", *sys.argv[3:]])
torch.manual_seed(0)
method = script.Method(config).eval()  # running statistics: the processes share no batch
if kind == "gpm":
    data = script.draw_cells(kind, 100, 1).float(), torch.zeros(100)
else:
    data = script.draw_patterns(100, 1)
torch.manual_seed(1)
epoch = [1] if hasattr(script, "WORLD") else [0, 0]
images, labels = next(script.batches([data], config, *epoch, torch.device("cpu")))
model = DistributedDataParallel(method) if dist.is_initialized() else method
loss, terms = model(images, labels)
loss.backward()
terms.pop("std")  # of the first process
terms.pop("rotation_top1", None)  # a few images on the edge may change sides
if dist.is_initialized():
    for term in terms.values():
        dist.all_reduce(term)
        term /= 2
if os.environ.get("RANK", "0") == "0":
    torch.save([terms, [p.grad for p in method.parameters() if p.requires_grad]], sys.argv[2])
if dist.is_initialized():
    dist.barrier()  # a process that leaves early can take the other down with it
    dist.destroy_process_group()
"""


@pytest.mark.parametrize(
    "script, flags",
    (
        ("simclr_essl", []),
        ("simclr_essl", ["--lam", "0"]),
        ("simclr_essl", ["--transform", "jigsaw"]),
        ("simclr_essl", ["--role", "invariant"]),
        ("simsiam_essl", []),
        ("simsiam_essl", ["--lam", "0"]),
        ("care", ["--chunks", "4"]),
        ("care", ["--base", "moco", "--queue", "100"]),
        ("care", ["--chunks", "4", "--equivariance-batch", "16"]),
        ("sfrik", ["--projector", "64-64"]),
        ("sfrik", ["--projector", "64-64", "--loss", "vicreg"]),
        ("sfrik", ["--projector", "64-64", "--loss", "auh"]),
        ("homomorphic", ["--group", "rotation"]),
        ("homomorphic", ["--group", "scale", "--ssl", "augmented"]),
        ("photonics_reg", ["--arch", "small"]),
    ),
)
def test_two_processes_compute_what_one_computes(tmp_path, script, flags):
    def launch(name, **env):
        return subprocess.Popen(
            [sys.executable, "-c", TWO, script, str(tmp_path / name), *flags],
            cwd=HERE,
            env=os.environ | env | {"OMP_NUM_THREADS": "1"},
            stderr=subprocess.PIPE,
        )

    port = str(20_000 + os.getpid() % 20_000)
    runs = [
        launch("two", RANK=str(r), WORLD_SIZE="2", MASTER_ADDR="127.0.0.1", MASTER_PORT=port)
        for r in range(2)
    ] + [launch("one")]
    for run in runs:
        assert run.wait(120) == 0, run.stderr.read().decode()
    one, two = torch.load(tmp_path / "one"), torch.load(tmp_path / "two")
    for name in one[0]:
        assert two[0][name].item() == pytest.approx(one[0][name].item(), rel=1e-5, abs=1e-8), name
    for a, b in zip(one[1], two[1], strict=True):
        assert torch.allclose(a, b, rtol=1e-3, atol=1e-6)


def test_gather_is_exact_in_bf16(monkeypatch):
    """One's own rows come back as they are, with a gradient times the number of processes."""
    monkeypatch.setattr(care, "process", lambda: (1, 8))
    monkeypatch.setattr(
        care.dist, "all_gather", lambda parts, z: [part.copy_(z) for part in parts]
    )
    z = torch.randn(4, 3, dtype=torch.bfloat16, requires_grad=True)
    gathered = care.gather(z)
    assert torch.equal(gathered, z.detach().repeat(8, 1))
    gathered.sum().backward()
    assert (z.grad == 8).all()


@pytest.mark.parametrize("script", TINY)
def test_torchrun_trains_and_writes_once(tmp_path, script):
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "torch.distributed.run",
            "--nproc_per_node=2",
            f"--master_port={21_000 + os.getpid() % 20_000}",
            f"{script}.py",
            *TINY[script](tmp_path / "run"),
        ],
        cwd=HERE,
        capture_output=True,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("epoch 3/3") == 1
    assert json.loads((tmp_path / "run" / "results.json").read_text())["processes"] == 2


def test_encoder_pt_loads_into_torchvision(tmp_path):
    simsiam_essl.main(
        tiny(
            tmp_path / "run",
            "--arch",
            "resnet18",
            "--epochs",
            "1",
            "--limit",
            "200",
            "--batch-size",
            "200",
            "--size",
            "8",
            "--small-size",
            "8",
            "--warmup-epochs",
            "0",
        )
    )
    encoder = models.resnet18()
    encoder.conv1, encoder.maxpool = (
        torch.nn.Conv2d(3, 64, 3, 1, 1, bias=False),
        torch.nn.Identity(),
    )
    encoder.fc = torch.nn.Identity()
    encoder.load_state_dict(
        torch.load(tmp_path / "run" / "encoder.pt", weights_only=True), strict=True
    )


def test_bf16_is_for_the_networks_only():
    method, images, labels = method_and_images("--precision", "bf16")
    seen = []
    method.projector.register_forward_hook(lambda module, inputs, output: seen.append(output.dtype))
    loss, terms = method(images, labels)
    assert (
        seen == [torch.bfloat16] * 2 and loss.dtype == terms["equivariance"].dtype == torch.float32
    )
    assert method.view(images, 0).dtype == torch.float32
    loss.backward()
    assert all(p.grad.dtype == torch.float32 for p in method.parameters())


def test_the_authors_probe_sees_fresh_crops_and_zoomed_test_images(monkeypatch):
    """Random crops of the bank for every epoch; tests resized by 9/8, bicubic, and center-cropped."""
    method, images, _ = method_and_images(n=30)
    images[0, :, :, :16], images[0, :, :, 16:] = 0, 255  # an edge, which bicubic weights overshoot
    labels, seen = torch.arange(30) % 3, []
    encode = method.features
    monkeypatch.setattr(method, "features", lambda V: seen.append(V) or encode(V))
    data = None, (images, labels), (images[:9], labels[:9])
    simsiam_essl.probe_views(method, data, method.config)
    test, first, second = seen[0], seen[1], seen[2]
    assert len(seen) == 101 and first.shape == second.shape == (30, 3, 32, 32)
    assert not torch.equal(first, second)
    zoomed = TF.resize(images[:9].float() / 255, [36, 36], InterpolationMode.BICUBIC)
    assert torch.allclose(test, TF.center_crop(zoomed, [32, 32]).clamp(0, 1))


# ----------------------------------------------------------------------------------- simsiam_essl

# golden: E-SSL CIFAR-10 code, D(p = z1, z = z2)
NEGATIVE_COSINE = {
    (8, 5, 0.3, 0.7, 0.35, 0.72): -0.9735987435868874,
    (16, 32, 1.1, 0.2, 1.0, 0.25): -0.8007049919128958,
}


@pytest.mark.parametrize("key", NEGATIVE_COSINE)
def test_negative_cosine_equals_the_authors(key):
    n, d, a1, b1, a2, b2 = key
    p, z = wave(n, d, a1, b1), wave(n, d, a2, b2)
    loss = simsiam_essl.negative_cosine(p, z)
    assert loss.item() == pytest.approx(NEGATIVE_COSINE[key], rel=1e-9)
    assert simsiam_essl.negative_cosine(p.bfloat16(), z.bfloat16()).dtype == torch.float32


def test_negative_cosine_gradient_equals_the_slow_loop_and_stops_at_z():
    p, z = torch.randn(2, 5, 3, dtype=torch.float64)
    p, z = p.requires_grad_(), z.requires_grad_()
    simsiam_essl.negative_cosine(p, z).backward()
    assert z.grad is None
    for i in range(5):  # d/dp of -p.z / |p||z|, by hand
        for j in range(3):
            cosine = sum(p[i, k] * z[i, k] for k in range(3)) / (p[i].norm() * z[i].norm())
            slope = z[i, j] / (p[i].norm() * z[i].norm()) - cosine * p[i, j] / p[i].norm() ** 2
            assert p.grad[i, j].item() == pytest.approx(-slope.item() / 5, rel=1e-9)


def test_simsiam_method_is_algorithm_1():
    config = simsiam_essl.parse_args(tiny("unused", "--lam", "0.7"))
    method = simsiam_essl.Method(config)
    images, labels = simsiam_essl.draw_patterns(16, 3)[0], torch.zeros(16).long()
    torch.manual_seed(1)
    loss, terms = method(images, labels)
    assert method.encoder[1].num_batches_tracked == 3 and method.h[1].num_batches_tracked == 2
    torch.manual_seed(1)
    mean, std = torch.tensor(simsiam_essl.MEAN_STD["patterns"])[..., None, None]
    draws = [
        simsiam_essl.augment(images, simsiam_essl.draw_augmentation(16, p, 32, 32, CPU), p.size)
        for p in simsiam_essl.view_policies(config)
    ]
    assert [tuple(d.shape[2:]) for d in draws] == [(32, 32), (32, 32), (16, 16)]
    z1, z2 = (method.projector(method.encoder((d - mean) / std)) for d in draws[:2])
    h1, h2 = method.h(z1), method.h(z2)
    cosines = [F.cosine_similarity(h1, z2.detach()), F.cosine_similarity(h2, z1.detach())]
    turned = torch.cat([torch.rot90(draws[2], k, (2, 3)) for k in range(4)])
    logits = method.predictor(method.encoder((turned - mean) / std)).log_softmax(1)
    rotation_loss = -sum(logits[k * 16 + i, k] for k in range(4) for i in range(16)) / 64
    want = -sum(cosines).mean() / 2 + 0.7 * rotation_loss
    assert loss.item() == pytest.approx(want.item(), rel=1e-5)
    assert terms["equivariance"].item() == pytest.approx(rotation_loss.item(), rel=1e-5)
    assert not any(term.requires_grad for term in terms.values())
    parameters = list(method.parameters())
    for got, wanted in zip(
        torch.autograd.grad(loss, parameters), torch.autograd.grad(want, parameters), strict=True
    ):
        assert torch.allclose(got, wanted, rtol=1e-3, atol=1e-6) and got.abs().sum() > 0


def test_simsiam_heads_have_the_specified_layers():
    kinds = lambda net: "".join(type(layer).__name__[0] for layer in net)
    method = simsiam_essl.Method(simsiam_essl.Config())
    assert kinds(method.projector) == "LBRLB" and method.projector[-1].weight is None
    assert kinds(method.h) == "LBRL" and kinds(method.predictor) == "LLRLLL"
    assert [layer.bias is None for layer in method.h if isinstance(layer, torch.nn.Linear)] == [
        True,
        False,
    ]
    assert (method.h[0].in_features, method.h[0].out_features) == (2048, 512)
    assert (method.h[3].in_features, method.h[3].out_features) == (512, 2048)
    assert method.predictor[-1].out_features == 4
    assert simsiam_essl.Method(simsiam_essl.Config(lam=0)).predictor is None


def test_h_keeps_its_rate_while_the_rest_follows_the_cosine(tmp_path, monkeypatch):
    rates, make = [], simsiam_essl.make_optimizer

    def spied(method, config):
        optimizer = make(method, config)
        others, h = (group["params"] for group in optimizer.param_groups)
        assert {id(p) for p in h} == {id(p) for p in method.h.parameters()}
        assert {id(p) for p in others} == {id(p) for p in method.parameters()} - {id(p) for p in h}
        assert [group["weight_decay"] for group in optimizer.param_groups] == [5e-4] * 2
        step = optimizer.step
        optimizer.step = lambda: (rates.append([g["lr"] for g in optimizer.param_groups]), step())
        return optimizer

    monkeypatch.setattr(simsiam_essl, "make_optimizer", spied)
    simsiam_essl.main(tiny(tmp_path / "run"))
    peak = 0.2 * 64 / 256
    want = [
        peak * step / 4 if step < 4 else peak * (1 + math.cos(math.pi * (step - 4) / 8)) / 2
        for step in range(12)
    ]
    assert [others for others, _ in rates] == pytest.approx(want)
    assert [h for _, h in rates] == pytest.approx([peak] * 12)
    results = json.loads((tmp_path / "run" / "results.json").read_text())
    assert results["rotation_top1"] is not None and results["knn_top1"] is not None


def test_without_the_stop_gradient_the_embeddings_collapse_and_a_warning_says_so(
    tmp_path, monkeypatch, capsys
):
    flags = ["--lam", "0", "--epochs", "14", "--lr", "0.24"]
    simsiam_essl.main(tiny(tmp_path / "with", *flags))
    assert "warning: the embeddings" not in capsys.readouterr().out
    monkeypatch.setattr(
        simsiam_essl, "negative_cosine", lambda p, z: -F.cosine_similarity(p, z).mean()
    )
    simsiam_essl.main(tiny(tmp_path / "without", *flags))
    assert "warning: the embeddings collapse" in capsys.readouterr().out


# ------------------------------------------------------------------------------------------- care

# golden: CARE code, InfoNCE at temperature 0.5 and L_equi: [loss, |dloss/dz1|, |dloss/dz2|]
CARE = {
    (8, 5, 0.3, 0.7, 0.35, 0.72): {
        0: (1.717286490101503, 0.15148178634031298, 0.11516476761010855),
        1: (0.13006332211262422, 0.6994578654940891, 0.6758810840689089),
        2: (0.01933762356234623, 0.21212251405593197, 0.22029342265322938),
        4: (0.001887174234987087, 0.030033280236594243, 0.03366621899957973),
    },
    (16, 32, 1.1, 0.2, 1.0, 0.25): {
        0: (1.9036428962240337, 0.06614670810175684, 0.06588266932345674),
        1: (0.060553464399842244, 0.08446995961998817, 0.08477384025005363),
        2: (0.03251465274522154, 0.061784355343207274, 0.06248180653302952),
        4: (0.015290326684648855, 0.04137087552665543, 0.041639830827585815),
    },
}


@pytest.mark.parametrize("key", CARE)
@pytest.mark.parametrize("chunks", (0, 1, 2, 4))
def test_care_losses_equal_the_authors(key, chunks):
    n, d, a1, b1, a2, b2 = key
    z1, z2 = wave(n, d, a1, b1).requires_grad_(), wave(n, d, a2, b2).requires_grad_()
    loss = care.equivariance_loss(z1, z2, chunks) if chunks else care.nt_xent(z1, z2, 0.5)
    loss.backward()
    assert (loss.item(), z1.grad.norm().item(), z2.grad.norm().item()) == pytest.approx(
        CARE[key][chunks], rel=1e-6
    )


def test_nt_xent_equals_the_slow_loop():
    z = torch.randn(2, 5, 4, dtype=torch.float64)
    rows = [F.normalize(row, dim=0) for row in z.flatten(0, 1)]
    terms = []
    for i in range(10):
        s = [math.exp(rows[i] @ rows[j] / 0.3) if j != i else 0 for j in range(10)]
        terms.append(-math.log(s[(i + 5) % 10] / sum(s)))
    assert care.nt_xent(*z, 0.3).item() == pytest.approx(sum(terms) / 10, rel=1e-12)


def orthogonal(d):
    return torch.linalg.qr(torch.randn(d, d, dtype=torch.float64))[0]


def test_equivariance_loss_of_rotated_embeddings_is_zero():
    z1, z2 = torch.randn(2, 12, 5, dtype=torch.float64)
    turned = torch.cat([part @ orthogonal(5) for part in z1.chunk(3)])  # another for each chunk
    assert care.equivariance_loss(z1, turned, 3).item() == pytest.approx(0, abs=1e-25)
    assert care.equivariance_loss(z1, turned, 1) > 0.01
    want = 0  # 2 (m - 1) times the mean over pairs of a chunk
    for a, b in zip(z1.chunk(3), z2.chunk(3)):
        for i in range(4):
            for j in range(4):
                if i != j:
                    g1 = F.cosine_similarity(a[i], a[j], dim=0)
                    g2 = F.cosine_similarity(b[i], b[j], dim=0)
                    want += 2 * 3 * (g1 - g2) ** 2 / 12 / 3
    assert care.equivariance_loss(z1, z2, 3).item() == pytest.approx(want.item(), rel=1e-12)


def care_method(*flags, n=16):
    config = care.parse_args(["--quick", "--batch-size", str(n), "--chunks", "4", *flags])
    torch.manual_seed(0)
    return care.Method(config), torch.zeros(n).long()


def test_care_is_algorithm_1():
    method, labels = care_method("--lam", "0.3")
    images = care.draw_patterns(16, 3)[0]
    torch.manual_seed(1)
    loss, terms = method(images, labels)
    torch.manual_seed(1)
    policy = care.view_policy(method.config)
    draws = [care.draw_augmentation(n, policy, 32, 32, CPU) for n in (16, 16, 4, 4)]
    draws[2:] = [{k: rows.repeat_interleave(4, 0) for k, rows in d.items()} for d in draws[2:]]
    mean, std = torch.tensor(care.MEAN_STD["patterns"])[..., None, None]
    z = [
        method.projector(method.encoder((care.augment(images, d, 32) - mean) / std)) for d in draws
    ]
    want = care.nt_xent(z[0], z[1], 0.5) + 0.3 * care.equivariance_loss(z[2], z[3], 4)
    assert loss.item() == pytest.approx(want.item(), rel=1e-5)
    assert method.encoder[1].num_batches_tracked == 8  # four forward passes, twice
    loss.backward()
    assert all(p.grad.abs().sum() > 0 for p in method.parameters())


def test_an_augmentation_is_shared_inside_a_chunk_only():
    method, _ = care_method()
    images = care.draw_patterns(1, 0)[0].expand(16, -1, -1, -1)
    for chunks, groups in ((4, 4), (1, 1), (None, 16)):
        view = method.a(images, chunks=chunks)
        same = (view[:, None] - view[None]).abs().amax((2, 3, 4)) < 1e-6
        label = torch.arange(16) * groups // 16
        assert torch.equal(same, label[:, None] == label[None])


def test_ablations_of_care():
    images = care.draw_patterns(16, 3)[0]
    method, labels = care_method("--lam", "0")
    assert method(images, labels)[1].keys() == {"contrast", "std"}
    method, labels = care_method("--contrast", "none", "--lam", "2")
    loss, terms = method(images, labels)
    assert loss.item() == pytest.approx(2 * terms["equivariance"].item()) and terms["contrast"] == 0
    summed = care_method("--share-pair")[0]
    mean = care_method("--share-pair", "--mean-gram")[0]
    values = []
    for method in (summed, mean):
        torch.manual_seed(3)
        values.append(method(images, labels)[1]["equivariance"].item())
    assert values[0] == pytest.approx(values[1] * 2 * 3)
    z1, z2 = torch.randn(2, 6, 3, dtype=torch.float64)
    z1, z2 = F.normalize(z1), F.normalize(z2)
    want = sum((a - b).norm() for a, b in zip(z1, z2)) / 6
    assert care.invariance_loss(3 * z1, z2).item() == pytest.approx(want.item(), rel=1e-12)
    rows = torch.cat([z1, z2])
    want = math.log(sum(math.exp(a @ b) for a in rows for b in rows) / 144)
    assert care.uniformity_loss(z1, 2 * z2).item() == pytest.approx(want, rel=1e-12)


def test_wahba_recovers_a_rotation():
    f = F.normalize(torch.randn(50, 6, dtype=torch.float64))
    turn = orthogonal(6)
    turn[:, 0] *= torch.sign(torch.det(turn))  # a rotation
    assert torch.allclose(care.wahba_rotation(f, f @ turn.T), turn, atol=1e-9)
    assert care.wahba_error(f, f @ turn.T) < 1e-12
    mirror = turn.clone()
    mirror[:, 0] *= -1
    assert torch.det(care.wahba_rotation(f, f @ mirror.T)).item() == pytest.approx(1)
    assert care.wahba_error(f, f @ mirror.T) > 0.1
    assert care.wahba_error(f, f @ mirror.T, reflections=True) < 1e-12
    g = F.normalize(torch.randn(50, 6, dtype=torch.float64))
    for reflections in (False, True):  # the closed form, for rows of length 1
        u, s, vt = torch.linalg.svd(g.T @ f)
        if not reflections:
            s[-1] *= torch.sign(torch.det(u @ vt))
        closed = (2 * 50 - 2 * s.sum()).sqrt().item()
        assert care.wahba_error(f, g, reflections) == pytest.approx(closed, rel=1e-9)


def test_rotations_of_two_augmentations_compose():
    f = F.normalize(torch.randn(40, 5, dtype=torch.float64))
    a, b = orthogonal(5), orthogonal(5)
    first = care.wahba_rotation(f, f @ a.T, reflections=True)
    second = care.wahba_rotation(f, f @ b.T, reflections=True)
    both = care.wahba_rotation(f, f @ a.T @ b.T, reflections=True)
    assert torch.allclose(both, second @ first, atol=1e-9)


def test_relative_equivariance():
    f = F.normalize(torch.randn(30, 5, dtype=torch.float64))
    assert care.relative_equivariance(f, f @ orthogonal(5)) < 1e-20
    assert math.isnan(care.relative_equivariance(f, f))  # exact invariance: undefined
    g = F.normalize(torch.randn(30, 5, dtype=torch.float64))
    terms = []
    for i in range(30):
        for j in range(i):
            change = (g[i] - g[j]).square().sum() - (f[i] - f[j]).square().sum()
            moved = (g[i] - f[i]).square().sum() + (g[j] - f[j]).square().sum()
            terms.append((change / moved) ** 2)
    assert care.relative_equivariance(f, g) == pytest.approx(sum(terms).item() / 435, rel=1e-9)


def test_proposition_3_bounds_the_distance_to_a_rotation():
    for trial in range(20):
        f = F.normalize(torch.randn(40, 4, dtype=torch.float64))
        f_a = F.normalize(f @ orthogonal(4) + 10 ** -(1 + trial / 8) * torch.randn_like(f))
        epsilon = (f_a @ f_a.T - f @ f.T).square().sum() ** 0.25
        inverse = torch.linalg.matrix_norm(torch.linalg.pinv(f), 2)
        if inverse * epsilon <= 2**-0.5:
            bound = (1 + 2**0.5) * inverse * epsilon**2
            assert care.wahba_error(f, f_a, reflections=True) <= bound
    assert inverse * epsilon <= 2**-0.5  # the last at least was small enough


def test_moco():
    method, labels = care_method("--base", "moco", "--queue", "24", "--lam", "0")
    images, queue = care.draw_patterns(16, 3)[0], method.queue.clone()
    before = [p.clone() for p in method.key_encoder.parameters()]
    with torch.no_grad():
        for p in method.encoder.parameters():
            p.add_(0.1 * torch.randn_like(p))
    keys, make = [], method.keys
    method.keys = lambda x: keys.append(make(x)) or keys[-1]
    torch.manual_seed(1)
    loss, _ = method(images, labels)
    for key, old, query in zip(
        method.key_encoder.parameters(), before, method.encoder.parameters()
    ):
        assert torch.allclose(key, 0.99 * old + 0.01 * query, atol=1e-6)
    torch.manual_seed(1)
    q = F.normalize(method.f(method.a(images))).detach()
    k = F.normalize(keys[0])
    assert method.config.temperature == 0.1
    want = 0
    for i in range(16):
        others = sum(math.exp(q[i] @ old / 0.1) for old in queue)
        same = math.exp(q[i] @ k[i] / 0.1)
        want -= math.log(same / (same + others)) / 16
    assert loss.item() == pytest.approx(want, rel=1e-4)
    loss.backward()
    assert all(p.grad is None for p in method.key_encoder.parameters())
    assert torch.allclose(method.queue[:16], k) and torch.equal(method.queue[16:], queue[16:])
    method(images, labels)  # the queue wraps around: the oldest go first
    new = F.normalize(keys[1])
    assert torch.allclose(method.queue[16:], new[:8]) and torch.allclose(method.queue[:8], new[8:])
    assert torch.allclose(method.queue[8:16], k[8:]) and method.oldest == 8


def test_haar_rotations():
    turns = care.haar_rotations(20_000, CPU).double()
    assert torch.allclose(turns @ turns.mT, torch.eye(3).double(), atol=1e-5)
    assert torch.allclose(torch.det(turns), torch.ones(20_000).double(), atol=1e-5)
    assert turns.mean(0).abs().max() < 0.02  # moments of the uniform law
    assert (turns.square().mean(0) - 1 / 3).abs().max() < 0.02
    assert turns.diagonal(dim1=1, dim2=2).sum(1).square().mean() == pytest.approx(1, abs=0.05)


PDB = "ATOM  {:5d}  {:<3} ALA A{:4d}    {:8.3f}{:8.3f}{:8.3f}  1.00  0.00           C\n"


def test_the_pdb_reader(tmp_path, capsys):
    def file(text):
        (tmp_path / "x.pdb").write_text(text)
        return tmp_path / "x.pdb"

    def refused(text):
        with pytest.raises(SystemExit) as stop:
            care.read_chain(file(text))
        assert stop.value.code == 2
        return capsys.readouterr().err

    atoms = "".join(
        PDB.format(i, name, i, i, -i, 0.5 * i) for i in range(1, 4) for name in ("N", "CA", "C")
    )
    want = torch.tensor([[1, -1, 0.5], [2, -2, 1], [3, -3, 1.5]])
    assert torch.equal(care.read_chain(file(atoms)), want)
    models = "MODEL        1\n" + atoms + "ENDMDL\nMODEL        2\n" + atoms + "ENDMDL\n"
    assert torch.equal(care.read_chain(file(models)), want)
    assert "no CA atoms" in refused("") and "no CA atoms" in refused("HEADER\n")
    assert "x.pdb, line 5" in refused(atoms.replace("   2.000", "   2.x00"))
    assert "x.pdb, line 8" in refused(atoms[:600])  # cut off inside a coordinate
    for wrong in ("     nan", "     inf", "     1e3", " 1_0.000", "   2.00 ", "     2.0"):
        assert "x.pdb, line 5" in refused(atoms.replace("   2.000", wrong))


def test_clouds():
    config = care.parse_args(["--quick", "--dataset", "chains", "--limit", "300"])
    train, bank, test = care.load_data(config, CPU)
    clouds = train[0]
    assert clouds.shape[0] == 300 and len(test[0]) == 200
    there = clouds[..., 3:]
    assert ((there == 0) | (there == 1)).all() and there.sum(1).min() >= 20
    assert (clouds[..., :3] * (1 - there)).abs().max() == 0
    assert clouds[..., :3].sum(1).abs().max() < 1e-3
    assert torch.allclose(clouds[..., :3].square().sum((1, 2)) / there.sum((1, 2)), torch.ones(300))
    steps = torch.cat([chain.diff(dim=0) for chain in care.draw_chains(5, 0)])
    assert torch.allclose(steps.norm(dim=1), torch.tensor(3.8))
    # permutation invariance, and padding counts for nothing
    torch.manual_seed(0)
    net = care.DeepSets()
    order = torch.randperm(clouds.shape[1])
    assert torch.allclose(net(clouds), net(clouds[:, order]), atol=1e-5)
    assert torch.allclose(net(clouds), net(F.pad(clouds, (0, 0, 0, 7))), atol=1e-5)
    # the axis turns with the chain
    turn = care.haar_rotations(300, CPU)
    axis, turned = care.principal_axis(clouds), care.principal_axis(care.rotate(clouds, turn))
    assert torch.allclose((axis[:, None] @ turn)[:, 0], turned, atol=1e-3)


def test_the_axis_probes_tell_what_an_embedding_knows(tmp_path, monkeypatch):
    """Both read an axis off; a sign they cannot know costs 90 degrees, nothing known costs more."""
    config = care.parse_args(["--quick", "--dataset", "chains", "--out", str(tmp_path)])
    data, method = care.load_data(config, CPU), care.Method(config)
    monkeypatch.setattr(care, "draw_paths", lambda *args: None)
    monkeypatch.setattr(care, "geometry", lambda *args: {})

    def measured(embedding):
        monkeypatch.setattr(care, "embed", lambda method, x, prepare=None: embedding(x))
        results = care.evaluate_chains(method, method, data, config)
        return [results[name] for name in ("axis_angle_degrees", "axis_free_angle_degrees")] + [
            results[name] for name in ("ridge_axis_angle_degrees", "ridge_axis_mse")
        ]

    angle, free, ridge, mse = measured(lambda x: 3 * care.principal_axis(x) + 5)
    assert angle < 6 and free < 6 and ridge < 0.1 and mse < 1e-4
    sign = lambda x: torch.randint(2, (len(x), 1)) * 2 - 1
    angle, free, ridge, mse = measured(lambda x: sign(x) * care.principal_axis(x))
    assert 75 < angle < 105 and 75 < ridge < 105 and mse == pytest.approx(1, abs=0.05)
    angle, free, ridge, mse = measured(lambda x: torch.ones(len(x), 16))
    assert 80 < angle < 100 and 45 < free < 70


def test_quick_on_chains_ends_with_its_measures(tmp_path):
    line = ["--quick", "--dataset", "proteins", "--limit", "512", "--epochs", "2"]
    care.main([*line, "--knn-every", "1", "--out", str(tmp_path / "run")])
    results = json.loads((tmp_path / "run" / "results.json").read_text())
    assert results["data"] == "synthetic" and results["knn_top1"] is None
    for name in ("axis_mse", "axis_angle_degrees"):
        assert math.isfinite(results[name]) and math.isfinite(results["random_init_" + name])
    assert (tmp_path / "run" / "paths.svg").read_text().count("polyline") == 3


def test_geometry_draws_the_same_augmentations_for_every_encoder():
    method, _ = care_method()
    images = care.draw_patterns(60, 0)[0]
    first, again = care.geometry(method, images, 3), care.geometry(method, images, 3)
    assert first == again and all(math.isfinite(value) for value in first.values())
    assert (
        first["wahba_o"] <= first["wahba_so"] + 1e-12
        and first["wahba_so"] <= first["invariance"] * 2
    )


def test_retrieval(tmp_path, monkeypatch):
    """By an encoder of the mean hue, a recoloured image finds images of its colour; overlap is small."""
    hue = torch.linspace(0, 1, 361)[:-1]
    red = torch.zeros(360, 3, 8, 8)
    red[:, 0] = 0.8
    images = (care.shift_hue(red, hue[:, None, None, None]) * 255).byte()
    off = (360 * care.mean_hue(images / 255) - torch.arange(360.0) + 180).remainder(360) - 180
    assert off.abs().max() < 2

    def embed(method, images, prepare=None):
        prepare = prepare or (lambda x: x / 255)
        angle = 2 * math.pi * care.mean_hue(prepare(images))
        return torch.stack([angle.cos(), angle.sin()], 1)

    monkeypatch.setattr(care, "embed", embed)
    data = None, (images, None), (images[::2], None)
    method, _ = care_method()
    found = care.retrieve(method, data, tmp_path / "r.png")
    assert found["overlap_at_5"] < 5 and found["hue_difference"] < 3
    monkeypatch.setattr(
        care, "embed", lambda method, images, prepare=None: torch.eye(360)[: len(images)]
    )
    found = care.retrieve(method, data, None)
    assert found["overlap_at_5"] == 100


def test_what_care_draws(monkeypatch):
    """How many augmentations each view takes, and of which images, under every flag."""
    drawn, draw = [], care.draw_augmentation
    monkeypatch.setattr(care, "draw_augmentation", lambda n, *a: drawn.append(n) or draw(n, *a))
    images = care.draw_patterns(16, 3)[0]
    for flags, counts in (
        ([], [16, 16, 4, 4]),
        (["--share-pair"], [16, 16, 1, 1]),
        (["--plain-gram"], [16, 16, 4]),
        (["--equivariance-batch", "8"], [16, 16, 4, 4]),
        (["--lam", "0"], [16, 16]),
    ):
        method, labels = care_method(*flags)
        method(images, labels)
        assert drawn == counts, flags
        drawn.clear()
    seen = []
    method, labels = care_method("--equivariance-batch", "8", "--plain-gram")
    monkeypatch.setattr(method, "f", lambda x: seen.append(x) or torch.rand(len(x), 3))
    method(images, labels)
    assert torch.equal(seen[3], images[::2] / 255) and len(seen[2]) == 8
    drawn, rotations = [], care.haar_rotations
    monkeypatch.setattr(care, "haar_rotations", lambda n, d: drawn.append(n) or rotations(n, d))
    config = care.parse_args(["--dataset", "chains", "--batch-size", "16", "--chunks", "4"])
    clouds = care.load_data(config, CPU)[0][0][:16]
    method = care.Method(config)
    method(clouds, labels)
    assert drawn == [16, 16, 4, 4]
    same = clouds[:1].expand(16, -1, -1)
    turned = method.a(same, chunks=4)
    assert torch.equal(turned[0], turned[3]) and not torch.allclose(turned[0], turned[4])
    assert not torch.allclose(turned, same) and torch.equal(turned[..., 3], same[..., 3])


def test_the_equivariance_branch_leaves_queue_and_keys_alone():
    method, labels = care_method("--base", "moco", "--queue", "64", "--lam", "1")
    images = care.draw_patterns(16, 3)[0]
    method(images, labels)
    assert method.oldest == 16
    tracked = [part[1].num_batches_tracked.item() for part in (method.encoder, method.key_encoder)]
    assert tracked == [3, 1]
    assert not method.keys(images / 255).requires_grad


def test_the_geometry_is_measured_in_float32():
    images = care.draw_patterns(16, 3)[0]
    exact, rounded = (care_method("--precision", name)[0] for name in ("fp32", "bf16"))
    assert torch.equal(care.embed(exact, images), care.embed(rounded, images))
    views = images.float() / 255
    assert not torch.equal(exact.eval().f(views), rounded.eval().f(views).float())
    assert rounded.config.precision == "bf16"


def test_care_logs_a_collapsed_run(tmp_path, monkeypatch):
    """No pair of embeddings that moved: gamma_f is undefined, and left out of the log."""
    embed = care.embed
    monkeypatch.setattr(care, "embed", lambda *args: torch.ones_like(embed(*args)))
    care.main(tiny_care(tmp_path / "run", "--knn-every", "1"))
    lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    assert "invariance" in json.loads(lines[1]) and "gamma_f" not in json.loads(lines[1])
    assert json.loads((tmp_path / "run" / "results.json").read_text())["gamma_f"] is None


def test_geometry_measures_what_it_says(monkeypatch):
    """With embeddings that every second augmentation rotates, and every other one reflects."""
    f, calls = F.normalize(torch.randn(40, 5, dtype=torch.float64)), []
    turn = orthogonal(5)
    turn = turn * torch.det(turn)  # in 5 dimensions: a rotation
    mirror = turn * torch.tensor([-1.0, 1, 1, 1, 1], dtype=torch.float64)

    def embed(method, images, prepare=None):
        if prepare is None:
            return f
        views = prepare(images)
        assert torch.equal(views, views[:1].expand_as(views))  # one augmentation for all
        calls.append(views[0])
        return f @ (turn if len(calls) % 2 else mirror)

    monkeypatch.setattr(care, "embed", embed)
    images = care.draw_patterns(1, 0)[0].expand(40, -1, -1, -1)
    method, _ = care_method()
    got = care.geometry(method, images, 4)
    assert len(calls) == 4 and not torch.allclose(calls[0], calls[1])
    assert got["wahba_o"] < 1e-10 and got["gamma_f"] < 1e-20
    want = care.wahba_error(f, f @ mirror) / 40**0.5 / 2
    assert got["wahba_so"] == pytest.approx(want) and want > 0.01
    moved = [(f - f @ m).norm(dim=1).mean().item() for m in (turn, mirror)]
    assert got["invariance"] == pytest.approx(sum(moved) / 2)
    monkeypatch.setattr(care, "embed", lambda *args: torch.ones(40, 5))
    assert care.geometry(method, images, 2)["gamma_f"] is None  # undefined


def test_cares_embeddings_are_of_the_head_in_eval_mode():
    method, _ = care_method()
    images = care.draw_patterns(10, 3)[0]
    z = care.embed(method, images)
    method.eval()
    mean, std = torch.tensor(care.MEAN_STD["patterns"])[..., None, None]
    want = F.normalize(method.projector(method.encoder((images / 255 - mean) / std)))
    assert torch.allclose(z, want, atol=1e-5)


def test_overlap_counts_the_same_images_in_any_order(monkeypatch):
    votes = [torch.tensor([[9.0, 8, 7, 6, 5, 0, 0]]), torch.tensor([[5.0, 6, 7, 8, 0, 9, 0]])]
    answers = iter([torch.eye(7), *votes])
    monkeypatch.setattr(care, "embed", lambda *args: next(answers))
    method, _ = care_method()
    data = None, (care.draw_patterns(7, 0)[0], None), (care.draw_patterns(1, 1)[0], None)
    assert care.retrieve(method, data, None)["overlap_at_5"] == pytest.approx(80)


def test_the_principal_axis_is_the_longest_and_points_to_the_tail():
    cloud = torch.tensor([[-1.0, 0, 0, 1], [-1, 0.2, 0, 1], [-1, 0, 0.1, 1], [3, -0.2, -0.1, 1]])
    axis = care.principal_axis(cloud[None])[0]
    assert axis[0] > 0.99 and axis.norm() == pytest.approx(1, rel=1e-6)
    assert care.principal_axis(-cloud[None])[0, 0] < -0.99


def write_chain(path, length):
    line = "ATOM  {:5d}  CA  GLY A{:4d}    {:8.3f}{:8.3f}{:8.3f}  1.00  0.00"
    steps = torch.randn(length, 3).cumsum(0).tolist()
    path.write_text("\n".join(line.format(i, i, *xyz) for i, xyz in enumerate(steps)))


def test_protein_folders(tmp_path, capsys):
    root = tmp_path / "proteins"
    root.mkdir()
    parse = lambda *flags: care.parse_args(
        ["--dataset", "proteins", "--data-root", str(tmp_path), *flags]
    )
    for i in range(30):
        write_chain(root / f"p{i:02d}.pdb", 19 if i == 5 else 20 + i)
    train, bank, test = care.load_data(parse(), CPU)
    assert (len(train[1]), bank, len(test[1])) == (26, None, 3)  # one is too short
    assert train[0].shape[1] == 49 and test[0][0, :, 3].sum() == 29  # p09: the tenth
    (root / "train.txt").write_text("p01.pdb\np02\np03\n")
    (root / "val.txt").write_text("p29\n")
    train, _, test = care.load_data(parse(), CPU)
    assert train[0][..., 3].sum(1).tolist() == [21, 22, 23] and test[0][0, :, 3].sum() == 49
    (root / "val.txt").write_text("p05\n")  # nothing is left to validate on
    argv = ["--dataset", "proteins", "--data-root", str(tmp_path), "--out", str(tmp_path / "run")]
    assert "too few" in fails(capsys, 2, *argv, script=care)
    (root / "val.txt").write_text("p77\n")
    assert "p77" in fails(capsys, 2, *argv, script=care)
    # the paths of a cloud about three axes differ
    method = care.Method(parse())
    care.draw_paths(tmp_path / "x.svg", method, train[0][0])
    lines = [x for x in (tmp_path / "x.svg").read_text().splitlines() if "polyline" in x]
    assert len({x.split('"')[1] for x in lines}) == 3


def test_cares_presets(tmp_path, capsys):
    parse = lambda *line: care.parse_args(line)
    values = lambda c, *names: tuple(getattr(c, name) for name in names)
    names = ("lam", "chunks", "optimizer", "lr", "final_lr", "weight_decay", "temperature")
    assert values(parse(), *names) == (0.01, 16, "adam", 1e-3, 1.0, 1e-6, 0.5)
    c = parse("--dataset", "cifar100")
    assert values(c, *names) == (0.001, 4, "adam", 1e-3, 1.0, 1e-6, 0.5)
    assert values(c, "arch", "epochs", "batch_size", "projector") == (
        "resnet50",
        400,
        256,
        "512-128",
    )
    c = parse("--dataset", "stl10")
    assert values(c, *names) == (0.01, 8, "sgd", 0.06, 0.0, 5e-4, 0.5) and c.warmup_epochs == 10
    c = parse("--dataset", "imagenet100")
    assert values(c, *names) == (0.005, 16, "sgd", 0.8, 0.0, 1e-4, 0.2)
    assert values(c, "epochs", "batch_size", "equivariance_batch", "size") == (200, 512, 128, 224)
    c = parse("--base", "moco")
    assert values(c, *names) == (0.01, 16, "sgd", 0.03, 0.0, 5e-4, 0.1)
    assert values(c, "queue", "key_momentum") == (4096, 0.99)
    assert (care.KNN_K, care.KNN_TEMPERATURE) == (200, 0.5)
    for c in (parse("--quick"), parse("--quick", "--dataset", "cifar100")):
        assert c.arch == "small" and c.epochs == 8
    policy = care.view_policy(parse())
    assert (policy.scale, policy.blur, policy.blur_radius) == ((0.08, 1.0), 0.5, 1)
    policy = care.view_policy(parse("--dataset", "imagenet100"))
    assert (policy.scale, policy.blur, policy.blur_radius) == ((0.2, 1.0), 0.5, 2)
    heads = [type(x).__name__ for x in care.make_projector((8, 6, 4), norm=True)]
    assert heads == ["Linear", "BatchNorm1d", "ReLU", "Linear"]
    assert isinstance(care.Method(parse("--quick")).projector[1], torch.nn.BatchNorm1d)
    # a baseline is not held to the flags of what it leaves out
    assert parse("--lam", "0", "--batch-size", "100").batch_size == 100
    assert parse("--batch-size", "8192").batch_size == 8192
    z1, z2 = torch.randn(2, 16, 3)
    for name, loss in (("uniformity", care.uniformity_loss), ("invariance", care.invariance_loss)):
        method, _ = care_method("--contrast", name)
        assert method.contrast(z1, z2) == loss(z1, z2)


def test_care_streams_a_folder(tmp_path, capsys):
    """With a list of classes, kNN and geometry during training, and all measures at the end."""
    image_tree(
        tmp_path / "tree",
        train__cat=110,
        train__cow=9,
        train__dog=95,
        val__cat=6,
        val__cow=3,
        val__dog=5,
    )
    (tmp_path / "list.txt").write_text("dog\ncat\n")
    argv = ["--dataset", "folder", "--arch", "small", "--size", "72", "--batch-size", "64"]
    argv += ["--epochs", "1", "--knn-every", "1", "--projector", "32-16", "--chunks", "4"]
    argv += ["--data-root", str(tmp_path / "tree"), "--classes", str(tmp_path / "list.txt")]
    care.main([*argv, "--out", str(tmp_path / "run")])
    results = json.loads((tmp_path / "run" / "results.json").read_text())
    for name in ("wahba_so", "wahba_o", "gamma_f", "invariance", "overlap_at_5", "hue_difference"):
        assert math.isfinite(results[name]) and math.isfinite(results["random_init_" + name])
    assert "bank of 205" in results["knn_protocol"]
    assert (tmp_path / "run" / "retrieval.png").exists()
    last = json.loads((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()[-1])
    assert "gamma_f" in last and "knn_top1" in last
    folder = care.load_data(care.parse_args(argv), CPU)[0][0]
    assert folder.classes == ["cat", "dog"]
    (tmp_path / "list.txt").write_text("")
    assert "empty" in fails(capsys, 2, *argv, "--out", tmp_path / "new", script=care)
    (tmp_path / "list.txt").write_bytes(b"\xff\xfe")
    assert "cannot read" in fails(capsys, 2, *argv, "--out", tmp_path / "new", script=care)
    line = ["--dataset", "imagenet100", "--data-root", tmp_path / "tree", "--out", tmp_path / "new"]
    assert "100 classes" in fails(capsys, 2, *line, script=care)


# ------------------------------------------------------------------------------------------ sfrik

# golden: SFRIK's code; sfrik 4000 and 1 with weights 1-40-40 or 1-40, vicreg 10-10-1, auh 3000-1-2.5,
# simclr at temperature 0.15: [loss, |dloss/dz1|, |dloss/dz2|]
SFRIK = {
    (8, 5, 0.3, 0.7, 0.35, 0.72): {
        "sfrik L=3": (62.16760080638928, 79.23587012049995, 79.38914667034038),
        "sfrik L=2": (52.509687181831666, 79.03729241977291, 79.77217540525524),
        "vicreg": (4.524743144819417, 0.8360672494013524, 0.6912275662151696),
        "auh": (29.75807677608779, 59.25586892223705, 59.64061004321384),
        "simclr": (1.053758978843689, 0.3573980766148844, 0.3103226398596795),
    },
    (16, 32, 1.1, 0.2, 1.0, 0.25): {
        "sfrik L=3": (54.52702586918945, 9.26883071669594, 9.252951397257835),
        "sfrik L=2": (52.575078775574276, 9.266053039440157, 9.240061912859343),
        "vicreg": (5.921771430334143, 0.3815566971237009, 0.37832121835446936),
        "auh": (32.29701228140772, 6.950002528864161, 6.938032909363837),
        "simclr": (0.16031864285469055, 0.0533835774652855, 0.05329532594087628),
    },
}
LOSSES = {
    "sfrik L=3": lambda a, b: sfrik.sfrik_loss(a, b, 4000, 1, (1, 40, 40)),
    "sfrik L=2": lambda a, b: sfrik.sfrik_loss(a, b, 4000, 1, (1, 40)),
    "vicreg": lambda a, b: sfrik.vicreg_loss(a, b, 10, 10, 1),
    "auh": lambda a, b: sfrik.auh_loss(a, b, 3000, 1, 2.5),
    "simclr": lambda a, b: sfrik.nt_xent(a, b, 0.15),
}


@pytest.mark.parametrize("key", SFRIK)
@pytest.mark.parametrize("name", LOSSES)
def test_losses_equal_the_authors(key, name):
    n, d, a1, b1, a2, b2 = key
    z1, z2 = wave(n, d, a1, b1).requires_grad_(), wave(n, d, a2, b2).requires_grad_()
    loss = LOSSES[name](z1, z2)
    loss.backward()
    assert (loss.item(), z1.grad.norm().item(), z2.grad.norm().item()) == pytest.approx(
        SFRIK[key][name], rel=1e-6
    )
    assert LOSSES[name](z1.bfloat16(), z2.bfloat16()).dtype == torch.float32


def test_legendre_polynomials():
    golden = {  # SFRIK's code, degrees 1 to 4
        (8192, 0.3): (0.3, 0.08988890245391283, 0.026900012208521548, 0.008040044344068234),
        (5, -0.6): (-0.6, 0.19999999999999996, 0.07199999999999995, -0.1648),
    }
    for (q, t), values in golden.items():
        t = torch.tensor(t, dtype=torch.float64)
        got = [sfrik.legendre(degree, q, t).item() for degree in (1, 2, 3, 4)]
        assert got == pytest.approx(values, rel=1e-12)
    angle = torch.linspace(0, 3, 7)  # on the circle: Chebyshev
    assert torch.allclose(sfrik.legendre(3, 2, angle.cos()), (3 * angle).cos(), atol=1e-5)
    nodes, weights = map(torch.from_numpy, np.polynomial.legendre.leggauss(200))
    for q in (3, 5, 8, 64):
        # Gegenbauer polynomials of index q / 2 - 1, by their own recurrence, over their value at 1
        t, index = torch.cat([nodes, torch.ones(1, dtype=torch.float64)]), q / 2 - 1
        gegenbauer = [torch.ones_like(t), 2 * index * t]
        for l in range(2, 7):
            a, b = gegenbauer[-1], gegenbauer[-2]
            gegenbauer.append((2 * (l + index - 1) * t * a - (l + 2 * index - 2) * b) / l)
        values = [sfrik.legendre(degree, q, t) for degree in range(7)]
        for got, want in zip(values, gegenbauer):
            assert torch.allclose(got, want / want[-1], atol=1e-11) and got[-1] == pytest.approx(1)
        sphere = weights * (1 - nodes**2) ** ((q - 3) / 2)  # the law of a coordinate on the sphere
        gram = torch.stack([value[:-1] for value in values])
        gram = (gram * sphere) @ gram.T / sphere.sum()
        assert (gram - gram.diagonal().diag()).abs().max() < 1e-6 and gram.diagonal().min() > 0


def test_mmd_to_uniform():
    """Its sign, its symmetry, its zero, its value on a collapsed batch and of uniform points."""
    weights = (1, 40, 40)
    for n, q in ((6, 4), (5, 16), (40, 3)):
        z = torch.randn(n, q, dtype=torch.float64)
        value = sfrik.mmd_to_uniform(z, weights)
        slow = 0
        for u in F.normalize(z):
            for v in F.normalize(z):
                t = u @ v
                p2, p3 = (q * t**2 - 1) / (q - 1), ((q + 2) * t**3 - 3 * t) / (q - 1)
                slow += (t + 40 * p2 + 40 * p3) / n**2
        assert value.item() == pytest.approx(slow.item(), rel=1e-12) and value > 0
        assert sfrik.mmd_to_uniform(2 * z @ orthogonal(q), weights).item() == pytest.approx(
            value.item(), rel=1e-10
        )
    axes = torch.cat([torch.eye(7), -torch.eye(7)]).double()  # a spherical 3-design
    for length in (1, 2, 3):
        assert sfrik.mmd_to_uniform(axes, weights[:length]).item() == pytest.approx(0, abs=1e-13)
    assert sfrik.mmd_to_uniform(axes, (1, 40, 40, 1)) > 1e-3
    assert sfrik.mmd_to_uniform(torch.ones(9, 5), weights).item() == pytest.approx(81)
    apart = torch.randn(2048, 512)  # uniform: little but the diagonal is left
    off = sfrik.mmd_to_uniform(apart, weights) - 81 / 2048
    assert abs(off) < 81 / 2048 / 20


def test_two_moments_give_the_same_mmd_as_the_gram_matrix():
    for n, q in ((50, 6), (7, 6), (6, 7)):
        z = F.normalize(torch.randn(n, q, dtype=torch.float64))
        t = z @ z.T
        for weights in ((3.0,), (1.0, 40.0)):
            gram = t.mean() * weights[0]
            moments = weights[0] * z.mean(0).square().sum()
            if len(weights) == 2:
                gram = gram + 40 * ((q * t**2 - 1) / (q - 1)).mean()
                moments = moments + 40 * (q * (z.T @ z / n).square().sum() - 1) / (q - 1)
            got = sfrik.mmd_to_uniform(z, weights).item()
            assert got == pytest.approx(gram.item(), rel=1e-10)
            assert got == pytest.approx(moments.item(), rel=1e-10)
            with Largest() as largest:
                sfrik.mmd_to_uniform(z, weights)
            assert (largest.size < n * n) == (n > q)  # by the moments, where that is less
    # zero exactly where the mean is 0 and the covariance I / q
    assert sfrik.mmd_to_uniform(torch.eye(4).repeat(3, 1), (0, 1)).item() == pytest.approx(
        0, abs=1e-6
    )
    assert sfrik.mmd_to_uniform(torch.eye(4).repeat(3, 1), (1, 1)).item() == pytest.approx(1 / 4)


class Largest(TorchDispatchMode):
    """Number of elements of the largest tensor that any operation makes."""

    size = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, (tuple, list)) else [result]:
            if isinstance(tensor, torch.Tensor):
                self.size = max(self.size, tensor.numel())
        return result


def test_sfrik_makes_no_tensor_of_q_squared_elements():
    sizes = {}
    for name, loss in LOSSES.items():
        z1, z2 = torch.randn(2, 16, 256).requires_grad_().unbind()
        with Largest() as largest:
            loss(z1, z2).backward()
        sizes[name] = largest.size
    assert sizes["vicreg"] == 256**2 and sizes["sfrik L=3"] == sizes["sfrik L=2"] == 2 * 16 * 256
    with Largest() as largest:  # as many images as dimensions
        LOSSES["sfrik L=2"](*torch.randn(2, 32, 32))
    assert largest.size == 2 * 32**2  # the two views, and no more


def test_the_other_kernels():
    z1, z2 = torch.randn(2, 5, 4, dtype=torch.float64)
    rows = F.normalize(z1)
    other = F.normalize(z2)
    pairs = [(rows[i] - rows[j]).norm() for i in range(5) for j in range(5) if i != j]
    distance, rbf = sum(pairs) / 20, sum(torch.exp(-2.5 * d**2) for d in pairs) / 20
    assert sfrik.mean_distance(rows).item() == pytest.approx(distance.item(), rel=1e-9)
    assert sfrik.mean_rbf(rows, 2.5).item() == pytest.approx(rbf.item(), rel=1e-9)
    same = F.normalize(torch.ones(4, 3)).requires_grad_()  # equal rows: no nan in the gradient
    (sfrik.mean_distance(same) + sfrik.mean_rbf(same, 2.5)).backward()
    assert same.grad.isfinite().all()
    for name in ("rbf", "distance"):
        method, _, _ = sfrik_method("--loss", name, "--sim-coeff", "3", "--mmd-coeff", "2")
        kernel = {
            "rbf": lambda z: sfrik.mean_rbf(z, 2.5),
            "distance": lambda z: -sfrik.mean_distance(z),
        }
        want = 3 * F.mse_loss(rows, other) + kernel[name](rows) + kernel[name](other)
        assert method.loss(z1, z2).item() == pytest.approx(want.item(), rel=1e-12)


def sfrik_method(*flags, n=16):
    config = sfrik.parse_args(tiny_sfrik("unused", *flags))
    torch.manual_seed(0)
    return sfrik.Method(config), sfrik.draw_patterns(n, 3)[0], torch.zeros(n).long()


@pytest.mark.parametrize("name", ("sfrik", "vicreg", "auh", "simclr"))
def test_sfrik_is_its_algorithm(name):
    flags = ["--loss", name, "--sim-coeff", "7", "--mmd-coeff", "2", "--weights", "1,30,0"]
    flags += ["--std-coeff", "8", "--cov-coeff", "3", "--scale", "1.5", "--temperature", "0.2"]
    method, images, labels = sfrik_method(*flags)
    torch.manual_seed(1)
    loss, terms = method(images, labels)
    torch.manual_seed(1)
    z = []
    for policy in sfrik.view_policies(method.config):
        drawn = sfrik.draw_augmentation(16, policy, 32, 32, CPU)
        view = sfrik.augment(images, drawn, 32, policy.interpolation)
        mean, std = torch.tensor(sfrik.MEAN_STD["patterns"])[..., None, None]
        z.append(method.projector(method.encoder((view - mean) / std)))
    want = {
        "sfrik": sfrik.sfrik_loss(*z, 7, 2, (1, 30)),
        "vicreg": sfrik.vicreg_loss(*z, 7, 8, 3),
        "auh": sfrik.auh_loss(*z, 7, 2, 1.5),
        "simclr": sfrik.nt_xent(*z, 0.2),
    }
    assert loss.item() == pytest.approx(want[name].item(), rel=1e-5)
    distance = (F.normalize(z[0]) - F.normalize(z[1])).norm(dim=1).square().mean()
    assert terms["distance"].item() == pytest.approx(distance.item(), rel=1e-5)
    off = sfrik.mmd_to_uniform(z[0], (1, 30)).item() * 16 / 15 - 31 / 15  # without i = j
    assert terms["mmd"].item() == pytest.approx(off, rel=1e-4)
    assert method.encoder[1].num_batches_tracked == 4  # two forward passes, twice
    loss.backward()
    assert all(p.grad.abs().sum() > 0 for n, p in method.named_parameters() if "weight" in n)


def test_lambda_and_the_two_coefficients():
    """The authors' factors; and lam is the weight of L_reg against the mean squared distance."""
    of = lambda *line: sfrik.Method(sfrik.parse_args(["--arch", "small", *line])).sim_coeff
    assert of("--projector", "64-8192") == pytest.approx(4000)
    assert of("--projector", "64-1024") == pytest.approx(500)
    assert of("--projector", "64-32768", "--lam", "0.8192") == pytest.approx(40000)
    assert of("--loss", "auh", "--projector", "64-8192") == pytest.approx(3000)
    assert of("--loss", "vicreg") == 10 and of("--sim-coeff", "25") == 25
    z1, z2 = torch.randn(2, 6, 9, dtype=torch.float64)
    paper = (F.normalize(z1) - F.normalize(z2)).square().sum(1).mean()
    paper = paper + 1.7 / 2 * sum(sfrik.mmd_to_uniform(z, (1, 40)) for z in (z1, z2))
    ours = sfrik.sfrik_loss(z1, z2, 5 * 9 / 1.7, 5, (1, 40))
    assert ours.item() == pytest.approx(5 / 1.7 * paper.item(), rel=1e-12)


def test_sfriks_presets():
    parse = lambda *line: sfrik.parse_args(line)
    c = parse("--dataset", "imagenet20")
    assert (c.arch, c.epochs, c.batch_size, c.size) == ("resnet18", 100, 2048, 224)
    assert (c.lr, c.weight_decay, c.warmup_epochs) == (1.2, 1e-6, 10)
    assert (c.projector, c.weights, c.lam) == ("8192-8192-8192", "1,40,40", 2.048)
    c = parse("--dataset", "imagenet")
    assert (c.arch, c.epochs, c.lr, c.projector) == ("resnet50", 200, 0.4, "8192-8192-32768")
    c = parse("--dataset", "imagenet20", "--loss", "vicreg")
    assert (c.lr, c.sim_coeff, c.std_coeff, c.cov_coeff) == (0.7, 10, 10, 1)
    assert parse("--loss", "simclr").lr == 0.8 and parse("--loss", "auh").lr == 1.0
    assert parse("--loss", "auh", "--lr", "0.3").lr == 0.3
    assert parse("--quick", "--loss", "simclr").lr == 0.1  # sgd: the rate of the built-in data
    c = parse("--quick", "--loss", "vicreg")
    assert (c.lr, c.sim_coeff) == (0.1, 10) and parse("--quick", "--loss", "auh").lam > 2.7
    assert parse("--loss", "vicreg", "--optimizer", "sgd").lr == 1.2
    c = parse("--dataset", "imagenet20", "--loss", "vicreg")
    assert parse("--dataset", "imagenet").lam == 0.8192
    assert (sfrik.KNN_K, sfrik.KNN_TEMPERATURE) == (200, 0.07)
    assert sfrik.MEAN_STD["stl10"] == ((0.441, 0.428, 0.387), (0.268, 0.261, 0.269))
    first, second = sfrik.view_policies(c)
    assert (first.blur, second.blur, first.solarize, second.solarize) == (1, 0.1, 0, 0.2)
    assert first.scale == (0.08, 1.0) and first.jitter == (0.4, 0.4, 0.2, 0.1)
    assert first.interpolation == second.interpolation == InterpolationMode.BICUBIC
    first, second = sfrik.view_policies(parse())
    assert (first.blur, second.blur, first.solarize, second.solarize) == (0, 0, 0, 0.2)
    first, second = sfrik.view_policies(parse("--dataset", "stl10"))
    assert (
        first == second and first.jitter == (0.4,) * 4 and first.jitter_p == 1 and first.blur == 0
    )
    # the schedule: base rate 1.2 at batch 2048, 100 epochs of 10 steps, down to 0.001 of the peak
    c = parse("--dataset", "imagenet20", "--arch", "small", "--projector", "32-32")
    optimizer = sfrik.make_optimizer(sfrik.Method(c), c)
    peak = optimizer.defaults["lr"]
    assert isinstance(optimizer, sfrik.LARS) and peak == pytest.approx(9.6)
    golden = {
        0: 0.0,
        5: 0.48,
        99: 9.504,
        100: 9.6,
        101: 9.599970786000636,
        500: 5.637477741548465,
        999: 0.009629213999363506,
    }
    for step, want in golden.items():
        got = sfrik.learning_rate(step, 1000, 100, peak, c.final_lr * peak)
        assert got == pytest.approx(want, rel=1e-9)


def test_sfriks_heads_and_stems():
    layers = [*sfrik.make_projector((8, 6, 6, 4))]
    assert [type(layer).__name__ for layer in layers] == [
        *["Linear", "BatchNorm1d", "ReLU"] * 2,
        "Linear",
    ]
    assert layers[0].bias is not None and layers[-1].bias is None and layers[1].affine
    kernel = lambda *line: sfrik.Method(
        sfrik.parse_args(["--projector", "8-8", *line])
    ).encoder.conv1.kernel_size[0]
    assert kernel("--dataset", "stl10") == 7 and kernel() == 3  # 64 pixels, with ImageNet's stem


def test_the_svm_solves_its_problem(monkeypatch):
    """Against plain gradient descent, and by the size of the gradient."""
    x = F.pad(F.normalize(torch.randn(40, 5, dtype=torch.float64)), (0, 1), value=1.0)
    labels, cost = torch.arange(40) % 3, 0.7
    w = sfrik.linear_svm(x, labels, cost)
    for c in range(3):
        y, v = torch.where(labels == c, 1.0, -1.0).double(), torch.zeros(6, dtype=torch.float64)
        for _ in range(20_000):
            slack = (1 - y * (x @ v)).clamp(min=0)
            gradient = v - 2 * cost * (slack * y) @ x
            v -= 0.01 * gradient
        assert gradient.norm() < 1e-10 and torch.allclose(w[:, c], v, atol=1e-5)
    again = sfrik.linear_svm(x, labels, cost, start=10 * torch.randn(6, 3, dtype=torch.float64))
    assert torch.allclose(w, again, atol=1e-5)
    train, test = torch.randn(90, 8), torch.randn(30, 8)
    train[:, 0], test[:, 0] = 8.0 * (torch.arange(90) % 3 - 1), 8.0 * (torch.arange(30) % 3 - 1)
    accuracy, cost = sfrik.svm_accuracy(train, torch.arange(90) % 3, test, torch.arange(30) % 3)
    assert accuracy > 90 and cost in (0.05, 0.1, 0.3, 0.5, 1.0, 3.0, 5.0, 10.0, 30.0)
    # features are normalised, and a fold is told by what the other two have taught
    seen, solve = [], sfrik.linear_svm
    monkeypatch.setattr(
        sfrik, "linear_svm", lambda x, *args, **how: seen.append(x) or solve(x, *args, **how)
    )
    sfrik.svm_accuracy(train, torch.arange(90) % 3, test, torch.arange(30) % 3)
    assert [len(x) for x in seen] == [60] * 27 + [90]
    assert (
        torch.allclose(seen[0][:, :-1].norm(dim=1), torch.ones(60)) and (seen[0][:, -1] == 1).all()
    )
    held, rows = [], F.normalize(train)
    for part in range(3):
        near = (seen[9 * part][:, :-1] @ rows.T).argmax(1)
        held.append(set(range(90)) - set(near.tolist()))
    assert set.union(*held) == set(range(90)) and sum(map(len, held)) == 90


def test_sfriks_probe_is_a_plain_linear_layer_trained_by_the_authors_rule():
    features, labels = torch.randn(96, 4), torch.arange(96) % 3
    defaults = inspect.signature(sfrik.linear_probe).parameters
    assert [defaults[name].default for name in ("lr", "epochs", "probes")] == [0.4, 100, 3]
    torch.manual_seed(5)
    got, _ = sfrik.linear_probe(features, labels, features, labels, epochs=4, probes=1)
    torch.manual_seed(5)
    weight = (0.01 * torch.randn(1, 4, 3))[0].requires_grad_()
    bias = torch.zeros(3, requires_grad=True)
    optimizer = torch.optim.SGD([weight, bias], 0.4, momentum=0.9, weight_decay=1e-6)
    for epoch in range(4):
        order = torch.rand(1, 96).argsort(1)[0]
        optimizer.param_groups[0]["lr"] = 0.2 * (1 + math.cos(math.pi * epoch / 4))
        loss = F.cross_entropy(features[order] @ weight + bias, labels[order])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    right = ((features @ weight + bias).argmax(1) == labels).float().mean().item()
    assert got == pytest.approx(100 * right)
    seen = []
    method, images, _ = sfrik_method()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sfrik, "linear_probe", lambda train, *rest: seen.append((train(), train())))
        sfrik.probe_views(method, images, None, images, None)
    assert len(seen[0][0]) == len(images) and not torch.allclose(*seen[0])  # fresh views


def test_label_fractions_are_balanced(capsys):
    labels = torch.cat([torch.arange(1000) % 10, torch.zeros(500).long()])
    for fraction, each in ((0.01, 2), (0.1, 15), (0.5, 75), (1e-6, 1)):
        rows = sfrik.balanced(labels, fraction)
        assert labels[rows].bincount().tolist() == [each] * 10 and rows.diff().min() > 0
        assert rows.max() < 1000  # the first of each class
    assert torch.equal(sfrik.balanced(labels, 1.0), torch.arange(1500))
    mixed = torch.randperm(1500)
    assert (sfrik.balanced(labels[mixed], 0.1).diff() > 0).all()
    with pytest.raises(SystemExit):
        sfrik.balanced(labels, 0.9)
    assert "a class has not 135 images" in capsys.readouterr().err


def test_validation_images_are_never_trained_on(tmp_path):
    parse = lambda *flags: sfrik.parse_args(["--dataset", "patterns", *flags])
    images = sfrik.draw_patterns(4000, 1)[0]
    train, bank, test = sfrik.load_data(parse("--validate"), CPU)
    assert (len(train[1]), len(bank[1]), len(test[1])) == (3600, 3600, 400)
    together = torch.cat([train[0], test[0]]).flatten(1).sum(1)
    assert torch.equal(together.sort()[0], images.flatten(1).sum(1).sort()[0])
    some = sfrik.load_data(parse("--validate", "--limit", "700"), CPU)
    assert torch.equal(some[2][0], test[0]) and torch.equal(some[0][0], train[0][:700])
    plain = sfrik.load_data(parse(), CPU)
    assert (len(plain[0][1]), len(plain[2][1])) == (4000, 1000)
    assert parse("--validate").out != parse().out
    # imagenet20: 260 images of a class, in the order of the files, and the 260 after them
    labels = torch.arange(3).repeat_interleave(600)
    config = sfrik.parse_args(["--dataset", "imagenet20", "--validate"])
    rows, kept = sfrik.hold_out(labels, config)
    assert rows.sort()[0].tolist() == [600 * c + i for c in range(3) for i in range(260)]
    assert kept.sort()[0].tolist() == [600 * c + i for c in range(3) for i in range(260, 520)]
    assert rows.tolist() != rows.sort()[0].tolist()


SFRIK_STREAM = ["--dataset", "imagenet20", "--arch", "small", "--size", "72", "--batch-size", "64"]
SFRIK_STREAM += ["--epochs", "1", "--projector", "32-32", "--save-every", "0"]


def test_sfrik_streams_a_folder(tmp_path, capsys):
    image_tree(tmp_path / "tree", train__cat=270, train__dog=105, val__cat=9, val__dog=8)
    argv = [*SFRIK_STREAM, "--data-root", str(tmp_path / "tree")]
    sfrik.main([*argv, "--out", str(tmp_path / "run")])
    results = json.loads((tmp_path / "run" / "results.json").read_text())
    assert "bank of 365" in results["knn_protocol"] and results["svm_top1"] is None
    assert results["linear_top1"] is not None and results["tested_on"] == "the test split"
    config = sfrik.parse_args([*argv, "--validate"])
    train, bank, test = sfrik.load_data(config, CPU)
    names = [Path(path).stem for path, _ in test[0].samples]
    assert len(test[1]) == 10 and (test[1] == 0).all() and "cat" in test[0].samples[0][0]
    assert not set(train[0].samples) & set(test[0].samples) and len(set(names)) == 10
    for (_, label), row in zip(train[0].samples, train[1].tolist(), strict=True):
        assert label == row
    limited = sfrik.load_data(sfrik.parse_args([*argv, "--limit", "300"]), CPU)[0]
    assert limited[0].samples == sfrik.load_data(sfrik.parse_args(argv), CPU)[0][0].samples[:300]
    few = ["--dataset", "imagenet20", "--data-root", tmp_path / "few", "--validate"]
    image_tree(tmp_path / "few", train__cat=110, train__dog=105)
    assert "260 images" in fails(capsys, 2, *few, "--out", tmp_path / "no", script=sfrik)
    argv = ["--eval", str(tmp_path / "run" / "checkpoint.pt"), "--validate"]
    argv += ["--data-root", str(tmp_path / "tree")]
    assert sfrik.parse_args(argv).validate
    image_tree(tmp_path / "flat", train=280)
    flat = [*SFRIK_STREAM, "--data-root", str(tmp_path / "flat")]
    assert "class folders" in fails(capsys, 2, *flat, script=sfrik)
    flat = sfrik.parse_args([*flat, "--limit", "270", "--dataset", "imagenet"])
    train, bank, test = sfrik.load_data(flat, CPU)
    assert len(train[1]) == 270 and bank is None and test is None
    assert "no evaluation" in capsys.readouterr().out


def test_sfrik_reads_stl10_at_its_own_size(tmp_path, monkeypatch):
    stl = tmp_path / "stl10_binary"
    stl.mkdir()
    for split, n in (("train", 210), ("test", 20), ("unlabeled", 50)):
        np.random.default_rng(n).integers(0, 256, n * 3 * 96 * 96, dtype=np.uint8).tofile(
            stl / f"{split}_X.bin"
        )
        if split != "unlabeled":
            (np.arange(n) % 10 + 1).astype(np.uint8).tofile(stl / f"{split}_y.bin")
    (stl / "class_names.txt").write_text("\n".join("abcdefghij"))
    (stl / "fold_indices.txt").write_text("0\n")
    monkeypatch.setattr(datasets.STL10, "_check_integrity", lambda self: True)
    argv = ["--dataset", "stl10", "--data-root", str(tmp_path)]
    data = sfrik.load_data(sfrik.parse_args(argv), CPU)
    assert [images.shape for images, _ in data] == [(n, 3, 96, 96) for n in (50, 210, 20)]
    data = sfrik.load_data(sfrik.parse_args([*argv, "--validate", "--limit", "30"]), CPU)
    assert [len(labels) for _, labels in data] == [30, 30, 21]
    method = sfrik.Method(sfrik.parse_args([*argv, "--arch", "small", "--projector", "16-16"]))
    assert method.view(data[0][0][:2], 0).shape == (2, 3, 64, 64)


def test_sfrik_evaluates_a_fraction_of_the_labels(tmp_path, capsys):
    out = tmp_path / "run"
    sfrik.main([*tiny_sfrik(out, "--limit", "300")])
    capsys.readouterr()
    results = json.loads((out / "results.json").read_text())
    for name in ("knn_top1", "knn_top1_k10", "knn_top1_k20", "knn_top1_k100", "svm_top1"):
        assert 10 < results[name] <= 100
    sfrik.main(["--eval", str(out / "checkpoint.pt"), "--label-fraction", "0.1"])
    text = capsys.readouterr().out
    fewer = json.loads(text[text.index("{") :])
    assert "30 labels" in fewer["linear_protocol"] and "30 labels" in fewer["svm_protocol"]
    assert fewer["knn_top1"] == results["knn_top1"] and fewer["svm_top1"] < results["svm_top1"]
    assert "lr" in fails(capsys, 2, "--eval", out / "checkpoint.pt", "--lr", "1", script=sfrik)
    again = fails(
        capsys, 2, *tiny_sfrik(out, "--limit", "300", "--label-fraction", "0.1"), script=sfrik
    )
    assert "label_fraction" in again  # not the old results under a new command
    line = ["--eval", out / "checkpoint.pt", "--label-fraction", "2"]
    assert "--label-fraction" in fails(capsys, 2, *line, script=sfrik)


def test_sfriks_factor_of_the_similarity():
    """From lam, but for VICReg, which has no lam and can do without it."""
    coeff = lambda *line: sfrik.Method(sfrik.parse_args(["--quick", *line])).sim_coeff
    assert coeff("--lam", "2") == 512 and coeff("--lam", "2", "--mmd-coeff", "3") == 3 * 512
    assert coeff("--mmd-coeff", "0", "--sim-coeff", "7") == 7
    assert coeff("--loss", "vicreg") == 10 and coeff("--loss", "vicreg", "--sim-coeff", "0") == 0


SFRIK_BAD = {
    "an unknown loss": (["--loss", "byol"], "byol"),
    "letters for weights": (["--weights", "1,x"], "1,x"),
    "a negative weight": (["--weights", "1,-40"], "1,-40"),
    "no lambda": (["--lam", "0"], "--lam is"),
    "no loss": (["--mmd-coeff", "0"], "--mmd-coeff 0"),
    "no labels": (["--label-fraction", "0"], "--label-fraction is"),
    "too many labels": (["--label-fraction", "1.5"], "at most 1"),
    "bad widths": (["--projector", "8-"], "8-"),
    "one dimension": (["--projector", "8-1"], "2 dimensions"),
    "no weights": (["--weights", "0,0,0"], "0,0,0"),
    "no scale": (["--scale", "0"], "--scale is"),
    "more labels than a class has": (["--label-fraction", "0.95"], "a class has not"),
    "a batch that is too large": (["--batch-size", "300"], "--batch-size 300"),
    "no folder": (["--dataset", "imagenet20", "--data-root", "nowhere"], "nowhere"),
    "another dataset": (["--dataset", "mnist"], "mnist"),
}


@pytest.mark.parametrize("name", SFRIK_BAD)
def test_sfriks_bad_input(name, tmp_path, capsys):
    flags, word = SFRIK_BAD[name]
    assert word in fails(capsys, 2, *tiny_sfrik(tmp_path / "run"), *flags, script=sfrik)
    assert not (tmp_path / "run" / "metrics.jsonl").exists()  # before training


# ------------------------------------------------------------------------------------ homomorphic

# golden: a slow double loop over Equation 2, temperature 0.1: [loss, |dloss/dz1|, |dloss/dz2|]
NCE = {
    (8, 5, 0.3, 0.7, 0.35, 0.72): (0.9287304578748303, 0.9170816312026937, 0.7819685404518322),
    (16, 32, 1.1, 0.2, 1.0, 0.25): (-3.7692339653330857, 0.4135734143558816, 0.4176165218341101),
}


@pytest.mark.parametrize("key", NCE)
def test_nce_loss_equals_the_golden_values(key):
    n, d, a1, b1, a2, b2 = key
    z1, z2 = wave(n, d, a1, b1).requires_grad_(), wave(n, d, a2, b2).requires_grad_()
    loss = homomorphic.nce_loss(z1, z2, 0.1)
    loss.backward()
    assert (loss.item(), z1.grad.norm().item(), z2.grad.norm().item()) == pytest.approx(
        NCE[key], rel=1e-6
    )


def test_nce_loss_equals_the_slow_loop():
    v = torch.randn(2, 5, 4, dtype=torch.float64)
    s = lambda a, b: F.cosine_similarity(a, b, dim=0) / 0.3
    want = 0
    for i in range(5):
        below = sum(
            torch.exp(s(v[j][i], v[l][k]))
            for k in range(5)
            if k != i
            for j in range(2)
            for l in range(2)
        )
        want -= torch.log(torch.exp(s(v[0][i], v[1][i])) / below) / 5
    assert homomorphic.nce_loss(*v, 0.3).item() == pytest.approx(want.item(), rel=1e-12)
    assert homomorphic.nce_loss(*v.bfloat16(), 0.3).dtype == torch.float32


def test_transforms():
    x = torch.rand(4, 2, 9, 9)
    assert torch.equal(homomorphic.transform(x, 1, "rotation")[:, :, 0], x[:, :, :, -1])
    g = torch.tensor([0, 1, 2, 3])
    turned = homomorphic.transform(x, g, "rotation")
    for k in range(4):
        assert torch.equal(turned[k], torch.rot90(x[k], k, (-2, -1)))
    g = torch.tensor([[0, 0], [2, 3], [-4, 1], [0, -9]])  # down and right
    moved = homomorphic.transform(x, g, "translation")
    for image, (down, right), got in zip(x, g.tolist(), moved):
        want = torch.zeros_like(image)
        for i in range(9):
            for j in range(9):
                if 0 <= i - down < 9 and 0 <= j - right < 9:
                    want[:, i, j] = image[:, i - down, j - right]
        assert torch.equal(got, want)
    bilinear = InterpolationMode.BILINEAR
    for factor in (0.57, 0.8, 1.0, 1.5):
        want = TF.affine(x, 0, [0, 0], factor, [0], bilinear)
        each = homomorphic.transform(x, torch.full((4,), factor), "scale")
        assert torch.allclose(homomorphic.transform(x, factor, "scale"), each)
        assert torch.allclose(each[..., 1:-1, 1:-1], want[..., 1:-1, 1:-1], atol=1e-5)
    assert torch.allclose(homomorphic.transform(x, 1.0, "scale"), x, atol=1e-6)


def test_the_basis_is_hermite_gaussian():
    for scale in (1.0, 1.5):
        basis = homomorphic.hermite_gaussians(9, 4, scale)
        grid = (np.arange(9) - 4) / scale
        for n in range(4):
            for m in range(4):
                he = [np.polynomial.hermite_e.HermiteE.basis(k)(grid) for k in (n, m)]
                want = np.outer(*he) * np.exp(-np.add.outer(grid**2, grid**2) / 2) / scale**2
                assert np.allclose(basis[4 * n + m].numpy(), want, atol=1e-12)
    # on a fine grid, the integral of a product is a sum of moments of exp(-x^2)
    fine = homomorphic.hermite_gaussians(401, 4, 20.0).view(4, 4, 401, 401)
    line = fine[:, 0, :, 200] * 20  # He_n(x) exp(-x^2 / 2), times the other direction's 1 / s
    moments = [math.gamma((k + 1) / 2) if k % 2 == 0 else 0 for k in range(8)]
    for n in range(4):
        for m in range(4):
            powers = [np.polynomial.hermite_e.herme2poly([0] * k + [1]) for k in (n, m)]
            product = np.polynomial.polynomial.polymul(*powers)
            want = sum(c * moments[k] for k, c in enumerate(product))
            assert (line[n] * line[m]).sum().item() * 20 == pytest.approx(want, abs=1e-6)


def test_bases_of_the_groups():
    basis = homomorphic.make_basis("rotation", 7, 3)
    for k in range(4):
        assert torch.equal(basis[k], basis[0].rot90(k, (1, 2)))
    assert torch.allclose(basis.flatten(2).norm(dim=2), torch.ones(4, 9))
    assert torch.equal(homomorphic.make_basis("translation", 7, 3)[0], basis[0])
    basis = homomorphic.make_basis("scale", 7, 3)
    assert basis.shape == (6, 9, 7, 7)
    sides = [7 - 2 * (plane[0, 3] == 0).nonzero().numel() // 2 for plane in basis]
    assert sides == [5, 5, 5, 7, 7, 7]  # basis A: smaller grids for smaller scales
    assert torch.allclose(basis[0].flatten(1).norm(dim=1), torch.ones(9))
    for plane, scale, side in zip(basis, homomorphic.SCALES, sides):
        raw = homomorphic.hermite_gaussians(side, 3, scale).float()
        least = homomorphic.hermite_gaussians(5, 3, 1.0).flatten(1).norm(dim=1).float()
        inner = plane[:, (7 - side) // 2 :, (7 - side) // 2 :][:, :side, :side]
        assert torch.allclose(inner, raw / least[:, None, None], atol=1e-6)


def test_a_larger_scale_sees_a_magnified_image():
    """Filtering at scale 1.5 s what is magnified by 1.5 gives the magnified result of scale s."""
    y, x = torch.meshgrid(*[torch.arange(-60.0, 61)] * 2, indexing="ij")
    image = lambda m: (
        torch.exp(-((x / m - 5) ** 2 + (y / m) ** 2 / 2) / 60)
        + 0.5 * torch.sin(x / m / 9) * torch.cos(y / m / 11)
    )
    response = {}
    for m, size in ((1.0, 41), (1.5, 61)):
        kernel = homomorphic.hermite_gaussians(size, 3, 4.0 * m).float()[:, None]
        response[m] = F.conv2d(image(m)[None, None], kernel, padding=size // 2)[0]
    small, large = response[1.0], response[1.5]
    for i, j in ((0, 0), (10, 4), (-8, 12), (-12, -6)):
        a, b = small[:, 60 + i, 60 + j], large[:, 60 + 3 * i // 2, 60 + 3 * j // 2]
        assert torch.allclose(a, b, atol=1e-3 * small.abs().max().item())


def homo_method(*flags, group="translation", n=12, dtype=torch.float32):
    config = homomorphic.parse_args(tiny_homo("unused", "--group", group, *flags))
    torch.manual_seed(0)
    method = homomorphic.Method(config).to(dtype)
    for norm in (m for m in method.modules() if isinstance(m, torch.nn.BatchNorm3d)):
        torch.nn.init.uniform_(norm.weight, 0.5, 1.5)
        torch.nn.init.uniform_(norm.bias, -0.5, 0.5)
    images = homomorphic.draw_patterns(n, 3)[0]
    return method, method.canvas(images.to(dtype) / 255), torch.zeros(n).long()


@pytest.mark.parametrize("dtype, bound", ((torch.float32, 1e-5), (torch.float64, 1e-12)))
@pytest.mark.parametrize("training", (True, False))
@pytest.mark.parametrize("arch", ("small", "mnist", "resnet20"))
def test_rotation_is_equivariant_at_every_depth(arch, training, dtype, bound):
    flags = ["--arch", arch, *["--width", "0.06"] * (arch == "resnet20")]
    method, x, _ = homo_method(*flags, group="rotation", dtype=dtype, n=4)
    encoder, turns = method.encoder.train(training), torch.tensor([0, 1, 2, 3])
    z, w = x, homomorphic.transform(x, turns, "rotation")
    for layer in encoder.layers:
        z, w = layer(z), layer(w)
        error = (homomorphic.act(z, turns, "rotation") - w).norm() / w.norm()
        assert error < bound
        assert (z - w).norm() / w.norm() > 100 * bound  # not invariant
        assert torch.equal(
            homomorphic.act(z, 1, "rotation")[:, :, 1], z[:, :, 0].rot90(1, (-2, -1))
        )


@pytest.mark.parametrize("dtype, bound", ((torch.float32, 1e-5), (torch.float64, 1e-12)))
def test_for_rotation_both_methods_are_one(dtype, bound):
    """Equal losses and gradients, with planes drawn to match: a turn by g moves plane g0 - g to g0."""
    method, x, _ = homo_method(group="rotation", dtype=dtype)
    n = len(x)
    g1, g2, g0 = torch.randint(4, (3, n))
    plane = lambda g: torch.stack([g % 4, 0 * g, 0 * g], 1)
    values = []
    for pair in (
        lambda: method.homomorphic(x, plane(g0 - g1), plane(g0 - g2))[:2],
        lambda: method.augmented(x, g1, g2, plane(g0)),
    ):
        method.zero_grad()
        loss = homomorphic.nce_loss(*pair(), 0.1)
        loss.backward()
        values.append((loss, [p.grad for p in method.encoder.parameters()]))
    (loss, gradients), (other, others) = values
    assert abs(loss - other) < bound * max(1, abs(other))
    for a, b in zip(gradients, others, strict=True):
        assert (a - b).norm() < 100 * bound * b.norm()
    wrong = homomorphic.nce_loss(*method.homomorphic(x, plane(g0 + g1), plane(g0 + g2))[:2], 0.1)
    assert abs(wrong - other) > 1e-3


def test_equivariance_errors():
    """Zero for rotation; small for translation; larger for scale; large without structure."""
    errors = {}
    for group, structure in (
        ("rotation", "equivariant"),
        ("translation", "equivariant"),
        ("scale", "equivariant"),
        ("translation", "none"),
        ("scale", "none"),
    ):
        method, x, _ = homo_method("--structure", structure, group=group)
        images = homomorphic.draw_patterns(12, 3)[0]
        errors[group, structure], unmoved = homomorphic.equivariance_errors(method, images)
        assert min(unmoved) > 0.1
    assert max(errors["rotation", "equivariant"]) < 1e-12
    assert max(errors["translation", "equivariant"]) < 0.1
    assert max(errors["scale", "equivariant"]) < 0.4
    assert errors["translation", "none"][-1] > 0.5 and errors["scale", "none"][-1] > 0.5


def test_act_of_translation_and_scale():
    z = torch.rand(2, 3, 1, 6, 6)
    moved, known = homomorphic.act(z, torch.tensor([[1, 2], [0, -3]]), "translation")
    assert torch.equal(moved[0, :, 0, 1:, 2:], z[0, :, 0, :-1, :-2])
    assert torch.equal(moved[1, :, 0, :, :3], z[1, :, 0, :, 3:])
    assert known[0].sum() == 3 * 5 * 4 and known[1].sum() == 3 * 6 * 3
    assert (moved[~known] == 0).all()
    z = torch.rand(2, 3, 6, 8, 8)
    moved, known = homomorphic.act(z, (1, 3), "scale")  # the maps grow, too
    want = homomorphic.transform(z[:, :, 1], 1.5 / 1.25, "scale")
    assert torch.equal(moved[:, :, 3], want) and known[:, :, 3].all()
    assert not known[:, :, [0, 1, 2, 4, 5]].any()


def test_sizes_that_break_the_group_are_refused():
    for size in (17, 19, 21, 23, 33):  # any odd size from 17 up
        z = homomorphic.GroupEncoder("rotation")(torch.rand(2, 3, size, size))
        assert z.shape[:3] == (2, 64, 4)
    for shape in ((2, 3, 32, 32), (2, 3, 33, 31)):
        with pytest.raises(ValueError, match="odd"):
            homomorphic.GroupEncoder("rotation")(torch.rand(shape))
    with pytest.raises(ValueError, match="stride"):  # 27 -> 14, and then a stride
        homomorphic.GroupEncoder("rotation", 1, "mnist", 0.1)(torch.rand(2, 1, 27, 27))
    homomorphic.GroupEncoder("translation")(torch.rand(2, 3, 32, 32))


def test_networks_have_the_papers_shapes():
    def shape(group, dataset, *flags):
        line = ["--dataset", dataset, "--group", group, "--width", "0.1", *flags]
        method = homomorphic.Method(homomorphic.parse_args(line))
        channels, side = (1, 28) if dataset == "mnist" else (3, 64 if "tiny" in dataset else 32)
        z = method.f(method.canvas(torch.rand(2, channels, side, side)))
        assert method.classifier(z).shape == (2, 200 if "tiny" in dataset else 10)
        return tuple(z.shape[1:])

    assert shape("translation", "mnist") == (13, 1, 7, 7)
    assert shape("rotation", "mnist") == (13, 4, 8, 8)
    assert shape("scale", "mnist") == (13, 6, 7, 7)
    assert shape("scale", "cifar10") == (51, 6, 8, 8) and shape("rotation", "cifar10")[1:] == (
        4,
        9,
        9,
    )
    assert shape("scale", "tinyimagenet") == (51, 6, 8, 8)
    assert shape("translation", "mnist", "--structure", "none") == (13, 1, 4, 4)
    assert shape("scale", "mnist", "--structure", "none") == (13, 6, 7, 7)
    layers = homomorphic.GroupEncoder("scale", 1, "mnist").layers
    convs = [layer[0] for layer in layers]
    assert [conv.weight.shape for conv in convs] == [(32, 1, 121), (64, 32, 9), (128, 64, 9)]
    assert [(conv.stride, conv.padding) for conv in convs] == [(1, 5), (2, 3), (2, 3)]
    free = homomorphic.GroupEncoder("scale", 1, "mnist", structure="none").layers
    assert free[1][0].weight.shape == (6 * 64, 6 * 32, 7, 7)
    z = torch.rand(2, 32, 6, 9, 9, requires_grad=True)
    free[1][0](z)[:, 0, 0].sum().backward()
    assert (z.grad.abs().sum((0, 1, 3, 4)) > 0).all()  # a free kernel sees all planes
    blocks = homomorphic.GroupEncoder("scale", 3, "resnet20").layers
    assert len(blocks) == 2 + 9
    assert isinstance(blocks[0], homomorphic.GroupConv)  # the lifting layer has no norm
    assert len(homomorphic.GroupEncoder("scale", 3, "tiny").layers) == 2 + 8
    head = [type(layer).__name__ for layer in homomorphic.make_head((8, 8, 8, 8))]
    assert head == ["Linear", "BatchNorm1d", "ReLU"] * 2 + ["Linear", "BatchNorm1d"]


def test_planes_are_filtered_alone_and_share_their_statistics():
    conv = homomorphic.GroupConv("scale", 3, 4, 7, 3, 1, 3)
    x = torch.rand(2, 3, 6, 9, 9)
    z = conv(x)
    kernel = torch.einsum("oif,fyx->oiyx", conv.weight, conv.basis[4])
    assert torch.allclose(z[:, :, 4], F.conv2d(x[:, :, 4], kernel, padding=3), atol=1e-5)
    block = homomorphic.Block("rotation", 3, 5, 2, "equivariant")
    assert block(torch.rand(2, 3, 4, 9, 9)).shape == (2, 5, 4, 5, 5)
    assert block.norm1.weight.shape == (3,) and isinstance(block.norm1, torch.nn.BatchNorm3d)


def test_homomorphic_and_augmented_forward():
    method, x, labels = homo_method("--temperature", "0.3")
    images = homomorphic.draw_patterns(12, 3)[0]
    torch.manual_seed(1)
    loss, terms = method(images, labels)
    torch.manual_seed(1)
    g1, g2 = method.draw_fibers(12)
    z = method.f(x)
    places = [z[torch.arange(12), :, 0, g[:, 1], g[:, 2]] for g in (g1, g2)]
    contrast = homomorphic.nce_loss(method.head(places[0]), method.head(places[1]), 0.3)
    classifier = F.cross_entropy(method.classifier(z.detach()), labels)
    assert loss.item() == pytest.approx((contrast + classifier).item(), rel=1e-5)
    assert terms["contrast"].item() == pytest.approx(contrast.item(), rel=1e-5)
    norm = method.encoder.layers[0][1]
    assert norm.num_batches_tracked == 2  # one forward pass, twice
    method, x, labels = homo_method("--ssl", "augmented", "--temperature", "0.3")
    torch.manual_seed(1)
    loss, terms = method(images, labels)
    torch.manual_seed(1)
    g0, _ = method.draw_fibers(12)
    shifts = [torch.randint(-6, 7, (12, 2)) for _ in range(2)]  # 20 % of 32 pixels
    v = []
    for shift in shifts:
        z = method.f(homomorphic.transform(x, shift, "translation"))
        v.append(method.head(z[torch.arange(12), :, 0, g0[:, 1], g0[:, 2]]))
    want = homomorphic.nce_loss(*v, 0.3)
    assert terms["contrast"].item() == pytest.approx(want.item(), rel=1e-5)


def test_the_classifier_sees_the_image_as_it_is():
    method, x, labels = homo_method("--ssl", "augmented", "--group", "scale")
    images = homomorphic.draw_patterns(12, 3)[0]
    method.eval()
    _, terms = method(images, labels)
    want = F.cross_entropy(method.classifier(method.f(x)), labels)
    assert terms["classifier"].item() == pytest.approx(want.item(), rel=1e-5)
    assert torch.allclose(method.features(images / 255), method.f(x).mean((2, 3, 4)), atol=1e-5)


def test_homomorphics_lars():
    method, _, _ = homo_method("--optimizer", "lars", "--lr", "0.5")
    optimizer = homomorphic.make_optimizer(method, method.config)
    assert (optimizer.decay, optimizer.eta, optimizer.defaults["lr"]) == (1e-4, 1e-3, 0.5)
    matrix, vector = method.classifier.linear.weight, method.classifier.linear.bias
    before = matrix.detach().clone(), vector.detach().clone()
    for p in method.parameters():
        p.grad = torch.ones_like(p)
    optimizer.step()
    gradient = 1 + 1e-4 * before[0]
    want = before[0] - 0.5 * 1e-3 * before[0].norm() / gradient.norm() * gradient
    assert torch.allclose(matrix, want, atol=1e-6) and torch.allclose(vector, before[1] - 0.5)


def test_what_each_mode_trains():
    images, labels = homomorphic.draw_patterns(12, 3)
    for ssl, encoder, head in (
        ("homomorphic", True, True),
        ("augmented", True, True),
        ("frozen", False, False),
        ("supervised", True, False),
    ):
        method, _, _ = homo_method("--ssl", ssl, group="scale")
        assert (method.head is not None) == head
        method(images, labels)[0].backward()
        moved = [p.grad is not None and p.grad.abs().sum() > 0 for p in method.encoder.parameters()]
        assert all(moved) if encoder else not any(moved)
        assert all(p.grad is not None for p in method.classifier.parameters())
    # the classifier trains nothing but itself
    method, x, _ = homo_method(group="scale")
    torch.manual_seed(1)
    method(images, labels)[0].backward()
    both = [p.grad.clone() for p in method.encoder.parameters()]
    method.zero_grad()
    torch.manual_seed(1)
    g1, g2 = method.draw_fibers(12)
    homomorphic.nce_loss(*method.homomorphic(x, g1, g2)[:2], 0.1).backward()
    for a, p in zip(both, method.encoder.parameters()):
        assert torch.allclose(a, p.grad, atol=1e-5)


def test_augmentations_are_drawn_from_the_papers_ranges():
    x = torch.zeros(1, 1, 28, 28)
    shift = homomorphic.draw_group(20_000, "translation", x)
    assert shift.shape == (20_000, 2) and shift.unique().tolist() == list(range(-5, 6))  # 20 %
    turns = homomorphic.draw_group(20_000, "rotation", x)
    assert torch.allclose(turns.bincount(minlength=4) / 20_000, torch.full((4,), 0.25), atol=0.02)
    factor = homomorphic.draw_group(20_000, "scale", x)
    assert 0.57 <= factor.min() < 0.575 and 0.995 < factor.max() <= 1
    assert factor.mean().item() == pytest.approx((0.57 + 1) / 2, abs=0.005)


def test_blocks_heads_and_classifiers_by_hand():
    block = homomorphic.Block("scale", 3, 5, 2, "equivariant").eval()
    x = torch.randn(2, 3, 6, 9, 9)
    y = F.relu(block.norm1(x))
    thin = y[..., ::2, ::2]  # both branches see the activated input
    skip = torch.einsum("oi,bilyx->bolyx", block.widen.weight[..., 0, 0], thin)
    want = skip + block.conv2(F.relu(block.norm2(block.conv1(y))))
    assert torch.allclose(block(x), want, atol=1e-5) and (block(x) < 0).any()
    same = homomorphic.Block("scale", 3, 3, 1, "equivariant").eval()
    want = x + same.conv2(F.relu(same.norm2(same.conv1(F.relu(same.norm1(x))))))
    assert torch.allclose(same(x), want, atol=1e-5) and same.widen is None

    free = homomorphic.Block("scale", 3, 5, 2, "none")  # a plain network of 6 times the channels
    assert free.norm1.norm.num_features == 18 and free.widen.weight.shape == (30, 18, 1, 1)
    assert free(x).shape == (2, 5, 6, 5, 5)
    several = torch.nn.SyncBatchNorm.convert_sync_batchnorm(free)  # on several GPUs
    assert isinstance(several.norm1, homomorphic.FreeNorm)
    y = torch.stack([(2 + i) * torch.randn(2, 3, 9, 9) for i in range(6)], 2)
    spread = homomorphic.FreeNorm(18)(y).std((0, 3, 4))
    assert torch.allclose(spread, torch.ones(3, 6), atol=0.01)  # each plane has its own statistics

    z = torch.randn(4, 8, 6, 7, 7)
    pooled = homomorphic.Classifier("scale", 8, 10, 0).eval()
    want = pooled.linear(F.relu(pooled.norm(z.max(2).values)).mean((2, 3)))
    assert torch.allclose(pooled(z), want, atol=1e-5)
    steerable = homomorphic.Classifier("scale", 8, 10, 7)
    assert steerable.conv(z).shape == (4, 8, 6, 1, 1)
    assert torch.allclose(
        steerable(z), steerable.linear(steerable.conv(z)[..., 0, 0].max(2).values)
    )

    config = homomorphic.parse_args(["--dataset", "cifar10", "--width", "0.05"])
    head = homomorphic.Method(config).head
    assert isinstance(head[0], torch.nn.BatchNorm1d) and head[1][0].out_features == 512
    assert isinstance(homo_method()[0].head[0], torch.nn.Sequential)  # none for MNIST's h


def test_images_are_normalised_before_the_encoder():
    method, x, _ = homo_method()
    mean, std = torch.tensor(homomorphic.MEAN_STD["patterns"])[..., None, None]
    assert torch.allclose(method.f(x), method.encoder((x - mean) / std), atol=1e-5)


def test_the_mlp_of_table_2():
    encoder = homomorphic.GroupEncoder("translation", 1, "mnist", structure="none", image_size=28)
    first, second = (m for m in encoder.modules() if isinstance(m, torch.nn.Linear))
    assert (first.in_features, first.out_features, second.out_features) == (784, 1024, 2048)
    x = torch.rand(3, 1, 28, 28)
    want = second(F.relu(first(x.flatten(1)))).view(3, 128, 1, 4, 4)  # 16 rows of 128
    assert torch.allclose(encoder(x), want, atol=1e-6)


def test_equivariance_errors_by_hand():
    """The first layer: plane i of the image against plane j of the magnified image."""
    method, x, _ = homo_method(group="scale")
    images = homomorphic.draw_patterns(12, 3)[0]
    got, scales = homomorphic.equivariance_errors(method, images), homomorphic.SCALES
    method.eval()
    mean, std = torch.tensor(homomorphic.MEAN_STD["patterns"])[..., None, None]
    layer, errors, unmoved = method.encoder.layers[0], [], []
    for i in range(5):
        factor, inner = scales[i + 1] / scales[i], slice(8, 24)
        z, w = (layer((y - mean) / std) for y in (x, homomorphic.transform(x, factor, "scale")))
        moved = homomorphic.transform(z[:, :, i], factor, "scale")[..., inner, inner]
        plane = w[:, :, i + 1, inner, inner]
        errors.append(((moved - plane).norm() / plane.norm()).item())
        here = z[:, :, i + 1, inner, inner]
        unmoved.append(((here - plane).norm() / plane.norm()).item())
    assert got[0][0] == pytest.approx(np.mean(errors), rel=1e-4)
    assert got[1][0] == pytest.approx(np.mean(unmoved), rel=1e-4)


def test_fibers_are_drawn_within_the_distance():
    def pairs(shape, *flags):
        config = homomorphic.parse_args(["--quick", *flags])
        return homomorphic.fiber_pairs(shape, config)

    assert len(pairs((1, 4, 4))) == 16**2 and len(pairs((6, 9, 9), "--group", "scale")) == 36
    near = pairs((1, 5, 5), "--distance", "1.5")
    far = (near[:, 0] - near[:, 1]).float().norm(dim=1)
    assert far.max() == pytest.approx(2**0.5) and (near[:, :, 0] == 0).all()
    assert len(pairs((1, 5, 5), "--distance", "1.2")) == 25 + 4 * 20  # Euclidean: no diagonals
    near = pairs((4, 9, 9), "--group", "rotation", "--distance", "1")
    assert len(near) == 4 + 2 * 3  # no wrap-around
    assert len(pairs((6, 9, 9), "--group", "scale", "--base-size", "3")) == 4**2
    method, x, _ = homo_method("--base-size", "2", group="rotation")
    z = method.f(x)
    g = torch.tensor([[3, 0, 0]]).repeat(12, 1)
    want = torch.cat([z[:, :, 3].mean((2, 3)), z[:, :, 0].mean((2, 3))], 1)  # in a circle
    assert torch.allclose(method.read(z, g), want, atol=1e-6)
    method, x, _ = homo_method("--base-size", "2")
    z = method.f(x)
    g = torch.tensor([[0, 2, 5]]).repeat(12, 1)
    assert torch.equal(method.read(z, g), torch.cat([z[:, :, 0, 2, 5], z[:, :, 0, 2, 6]], 1))
    many = torch.stack(method.draw_fibers(4000)).flatten(0, 1)
    assert many[:, 2].max() == z.shape[4] - 2 and many[:, 1].max() == z.shape[3] - 1
    first, second = homo_method()[0].draw_fibers(4000)
    assert (first != second).any(1).float().mean() > 0.98  # drawn independently


def test_mnist_and_tiny_imagenet_files(tmp_path, monkeypatch):
    raw = tmp_path / "MNIST" / "raw"
    raw.mkdir(parents=True)
    for part, n in (("train", 250), ("t10k", 30)):
        header = b"".join(k.to_bytes(4, "big") for k in (2051, n, 28, 28))
        (raw / f"{part}-images-idx3-ubyte").write_bytes(header + bytes(n * 784))
        header = b"".join(k.to_bytes(4, "big") for k in (2049, n))
        (raw / f"{part}-labels-idx1-ubyte").write_bytes(header + bytes(i % 10 for i in range(n)))
    line = ["--data-root", str(tmp_path)]
    data = homomorphic.load_data(homomorphic.parse_args([*line, "--limit", "100"]), CPU)
    assert [images.shape for images, _ in data] == [(k, 1, 28, 28) for k in (100, 100, 30)]
    assert data[2][1].tolist() == [i % 10 for i in range(30)]
    root = tmp_path / "tiny-imagenet-200"
    for word in ("n01", "n02"):
        (root / "train" / word / "images").mkdir(parents=True)
        for i in range(3):
            image = torch.full((3, 64, 64), (0.2 if word == "n01" else 0.8) + i / 100)
            save_image(image, root / "train" / word / "images" / f"{i}.png")
    (root / "val" / "images").mkdir(parents=True)
    for i, light in enumerate((0.8, 0.2)):
        save_image(torch.full((3, 64, 64), light), root / "val" / "images" / f"val_{i}.png")
    (root / "val" / "val_annotations.txt").write_text(
        "val_0.png\tn02\t0\t0\t9\t9\nval_1.png\tn01\t0\t0\t9\t9\n"
    )
    line += ["--dataset", "tinyimagenet"]
    train, bank, (images, labels) = homomorphic.load_data(homomorphic.parse_args(line), CPU)
    assert train[0].shape == (6, 3, 64, 64) and train[1].tolist() == [0, 0, 0, 1, 1, 1]
    assert labels.tolist() == [1, 0] and images[0, 0, 0, 0] > images[1, 0, 0, 0]
    asked = {}
    monkeypatch.setattr(
        homomorphic,
        "download_and_extract_archive",
        lambda url, where, md5: (
            asked.update(url=url, md5=md5) or shutil.copytree(root, where / root.name)
        ),
    )
    line = ["--dataset", "tinyimagenet", "--data-root", str(tmp_path / "new")]
    (tmp_path / "new").mkdir()
    assert len(homomorphic.load_data(homomorphic.parse_args(line), CPU)[2][1]) == 2
    assert asked["md5"] == "90528d7ca1a48142e341f4ef8d21d0de"


def test_homomorphic_presets_and_outputs(tmp_path, capsys):
    parse = lambda *line: homomorphic.parse_args(line)
    c = parse()
    assert (c.dataset, c.group, c.epochs, c.batch_size, c.lr) == (
        "mnist",
        "translation",
        500,
        4096,
        0.1,
    )
    assert (c.warmup_epochs, c.weight_decay, c.temperature) == (10, 1e-4, 0.1)
    assert parse("--dataset", "cifar10").projector == "512-2048-512"
    assert parse("--dataset", "tinyimagenet").epochs == 1300
    quick, scale = (parse("--quick", "--group", group) for group in ("rotation", "scale"))
    assert (quick.limit, quick.epochs) == (4000, 10) and (scale.limit, scale.epochs) == (1200, 5)
    single = parse("--single-device")
    assert (single.epochs, single.batch_size) == (50, 1024) and single.out != c.out
    optimizer = homomorphic.make_optimizer(homomorphic.Method(c), c)
    assert isinstance(optimizer, homomorphic.LARS) and optimizer.defaults["lr"] == 0.1
    homomorphic.main(tiny_homo(tmp_path / "run", "--group", "scale"))
    results = json.loads((tmp_path / "run" / "results.json").read_text())
    for name in ("classifier_top1", "knn_top1", "random_init_knn_top1", "linear_top1"):
        assert 0 < results[name] <= 100
    assert len(results["equivariance_errors"]) == 3
    capsys.readouterr()
    with pytest.raises(SystemExit) as end:
        homomorphic.main(
            ["--eval", str(tmp_path / "run" / "checkpoint.pt"), "--measure-equivariance"]
        )
    assert end.value.code is None
    lines = [line.replace(",", "").split() for line in capsys.readouterr().out.splitlines()]
    for column, name in ((2, "equivariance_errors"), (4, "equivariance_errors_unmoved")):
        got = [float(line[column]) for line in lines]
        assert got == pytest.approx(results[name], rel=0.01)
    line = tiny_homo("unused", "--group", "scale", "--measure-equivariance")
    for _ in range(2):  # the weights are those of the seed
        with pytest.raises(SystemExit):
            homomorphic.main(line)
    printed = capsys.readouterr().out.splitlines()
    assert printed[:3] == printed[3:] and len(printed) == 6


@pytest.mark.parametrize("arch", ("mnist", "resnet20", "tiny"))
@pytest.mark.parametrize("group", ("translation", "rotation", "scale"))
def test_every_network_takes_the_layout_of_training(arch, group):
    """train asks for channels_last, which tensors of five dimensions cannot have."""
    flags = ["--dataset", "cifar10", "--arch", arch, "--width", "0.02", "--group", group]
    method = homomorphic.Method(homomorphic.parse_args(flags))
    method.to(CPU, memory_format=torch.channels_last)
    loss, _ = method(torch.randint(256, (4, 3, 32, 32), dtype=torch.uint8), torch.arange(4))
    loss.backward()
    assert loss.isfinite() and all(p.grad.isfinite().all() for p in method.parameters())


HOMO_BAD = {
    "an even map": (["--dataset", "mnist", "--arch", "tiny", "--group", "rotation"], "even map"),
    "rotation without structure": (
        ["--group", "rotation", "--structure", "none"],
        "--structure none",
    ),
    "an unknown group": (["--group", "shear"], "shear"),
    "a base larger than the group": (["--group", "scale", "--base-size", "7"], "--base-size 7"),
    "no width": (["--width", "0"], "--width is"),
    "bad widths": (["--projector", "128-a"], "128-a"),
    "a batch that is too large": (["--batch-size", "300"], "--batch-size 300"),
    "no data": (["--dataset", "mnist", "--data-root", "/dev/null/data"], "try --quick"),
    "another dataset": (["--dataset", "stl10"], "stl10"),
    "a negative distance": (["--distance", "-1"], "--distance is"),
    "a base over all rotations": (["--group", "rotation", "--base-size", "5"], "4 elements"),
    "a base over all scales": (["--group", "scale", "--base-size", "6"], "no two different"),
    "a distance below 1": (["--group", "scale", "--distance", "0.5"], "no two different"),
    "a distance of A-SSL": (["--ssl", "augmented", "--distance", "2"], "for H-SSL"),
    "a base that nobody reads": (["--ssl", "frozen", "--base-size", "2"], "--base-size is for"),
}


@pytest.mark.parametrize("name", HOMO_BAD)
def test_homomorphics_bad_input(name, tmp_path, capsys):
    flags, word = HOMO_BAD[name]
    assert word in fails(capsys, 2, *tiny_homo(tmp_path / "run"), *flags, script=homomorphic)


# ---------------------------------------------------------------------------------- photonics_reg

# golden: E-SSL photonics code, NT-Xent at temperature 0.1: [loss, |dloss/dz1|, |dloss/dz2|]
PHOTONICS_NT_XENT = {
    (8, 5, 0.3, 0.7, 0.35, 0.72): (0.8612976550331471, 0.4970166068336627, 0.4528257064630726),
    (16, 32, 1.1, 0.2, 1.0, 0.25): (
        0.01908587895001622,
        0.015867597444866047,
        0.015937764471201103,
    ),
}

# golden: MPB 1.11.1 at resolution 32. Permittivity: lowest and highest, then ten levels between as
# digits, row by row; frequencies of 6 bands at every 50th wave vector; labels at every 10th point.
MPB = {
    "c_p1_1": (
        5.983953468395142,
        15.256928779970995,
        "00000000399999999300000000000000000000005999999993000000000000000000000069999999930000"
        "00000000000000000069999999930000000000000000000000699999999300000000000000000000006999"
        "99999300000000000000000000005999999993000000000000000000000039999999960000000000000000"
        "00000009999999960000000000000000000000059999999600000000000000000000000199999997000000"
        "00000000000000000049999999000000000000000000000000079999991000000000000000000000000189"
        "99994000000000000000000000000029999970000000000000000000000000059999910000000000000000"
        "00000000008999950000000000000000000000000049999800000000000000000000000000199999200000"
        "00000000000000000000099999300000000000000000000000000999993000000000000000000000000009"
        "99990000000000000000000000000009999500000000000000000000000000399980000000000000000000"
        "00000000899940000000000000000000000000069999000000000000000000000000004999960000000000"
        "00000000000000039999950000000000000000000000002999999300000000000000000000000089999993"
        "000000000000000000000005999999930000000000000000000000089999999300000000000000",
        [
            0.21516,
            0.23161,
            0.27792,
            0.28908,
            0.47100,
            0.48319,
            0.20174,
            0.24416,
            0.26025,
            0.31220,
            0.45170,
            0.50203,
            0.18762,
            0.23623,
            0.26858,
            0.33688,
            0.43144,
            0.52097,
            0.17546,
            0.22170,
            0.28746,
            0.36260,
            0.41093,
            0.52504,
            0.16609,
            0.21028,
            0.30744,
            0.38804,
            0.39131,
            0.49907,
            0.16016,
            0.20307,
            0.32785,
            0.36940,
            0.41623,
            0.47161,
            0.15812,
            0.20060,
            0.34667,
            0.35051,
            0.44138,
            0.44625,
            0.16016,
            0.20308,
            0.32777,
            0.36948,
            0.41633,
            0.47149,
            0.16609,
            0.21030,
            0.30735,
            0.38796,
            0.39156,
            0.49892,
            0.17545,
            0.22175,
            0.28734,
            0.36266,
            0.41106,
            0.52482,
            0.18760,
            0.23637,
            0.26838,
            0.33696,
            0.43158,
            0.52066,
            0.20172,
            0.24448,
            0.25987,
            0.31229,
            0.45185,
            0.50179,
            0.21514,
            0.23167,
            0.27778,
            0.28920,
            0.47115,
            0.48303,
        ],
        [
            1.53651,
            1.69670,
            1.86186,
            2.03299,
            2.20953,
            2.39799,
            2.60701,
            2.85316,
            3.26936,
            3.58856,
            3.05708,
            2.68654,
            2.70190,
            2.83061,
            3.65840,
            3.82647,
            3.70432,
            4.38575,
            4.72433,
            4.70338,
            3.81014,
            4.66935,
            4.92425,
            5.09417,
            5.25028,
            5.43007,
            5.61399,
            5.79468,
            5.83653,
            6.29492,
        ],
    ),
    "c_pm_1": (
        6.760701756541254,
        15.980145365139682,
        "99999930000000000000399999999999999999300000000000003999999999999999993000000000000039"
        "99999999999999996000000000000039999999999999999970000000000000399999999999999999910000"
        "00000000399999999999999999940000000000003999999999999999999800000000000069999999999999"
        "99999940000000000069999999999999999999910000000000799999999999999999999800000000009999"
        "99999999999999999960000000019999999999999999999999960000000399999999999999999999999930"
        "00000699999999999999999999999991000007999999999999999999999999960000099999999999999999"
        "99999999970000099999999999999999999999999600000999999999999999999999999991000007999999"
        "99999999999999999930000006999999999999999999999996000000039999999999999999999999600000"
        "00019999999999999999999998000000000099999999999999999999910000000000799999999999999999"
        "99400000000000699999999999999999980000000000006999999999999999999400000000000039999999"
        "99999999999100000000000039999999999999999970000000000000399999999999999999600000000000"
        "003999999999999999993000000000000039999999999999999930000000000000399999999999",
        [
            0.17633,
            0.18427,
            0.20670,
            0.22700,
            0.39661,
            0.40572,
            0.16308,
            0.19411,
            0.20022,
            0.24043,
            0.37799,
            0.41352,
            0.15108,
            0.18175,
            0.21562,
            0.25792,
            0.35922,
            0.40628,
            0.14098,
            0.17051,
            0.23230,
            0.27652,
            0.34050,
            0.39165,
            0.13326,
            0.16186,
            0.24954,
            0.29566,
            0.32189,
            0.37354,
            0.12840,
            0.15641,
            0.26719,
            0.30342,
            0.31506,
            0.35445,
            0.12673,
            0.15454,
            0.28513,
            0.28523,
            0.33240,
            0.33717,
            0.12840,
            0.15641,
            0.26719,
            0.30342,
            0.31506,
            0.35445,
            0.13326,
            0.16186,
            0.24954,
            0.29566,
            0.32189,
            0.37354,
            0.14098,
            0.17051,
            0.23230,
            0.27652,
            0.34050,
            0.39165,
            0.15108,
            0.18175,
            0.21562,
            0.25792,
            0.35922,
            0.40628,
            0.16308,
            0.19411,
            0.20022,
            0.24043,
            0.37799,
            0.41352,
            0.17633,
            0.18427,
            0.20670,
            0.22700,
            0.39661,
            0.40572,
        ],
        [
            1.52795,
            1.68468,
            1.84551,
            2.00969,
            2.17708,
            2.35211,
            2.53848,
            2.74419,
            3.02942,
            3.50091,
            3.09651,
            2.65579,
            2.65998,
            3.22968,
            3.64393,
            3.81530,
            3.98232,
            4.16857,
            4.39591,
            4.52950,
            4.64976,
            4.90728,
            4.72720,
            4.69966,
            5.16889,
            5.42212,
            5.61259,
            5.82450,
            6.08630,
            6.40746,
        ],
    ),
    "c_pm_2": (
        9.03290879213243,
        13.716648672915882,
        "00000099999999600000000000000000000000999999996000000000000000000000009999999980000000"
        "00000000000000009999999990000000000000000000000099999999930000000000000000000000999999"
        "99970000000000000000000000999999999930000000000000000000009999999999961000000000000000"
        "00009999999999999642000000000000000099999999999999999764330000632000999999999999999999"
        "99999986999974999999999999999999999999999999990599999999999999999999999999999900599999"
        "99999999999999999999999900099999999999999999999999999999000699999999999999999999999999"
        "99000699999999999999999999999999990006999999999999999999999999999900099999999999999999"
        "99999999999900599999999999999999999999999999059999999999999999999999999999749999999999"
        "99999999999999996320009999999999999999999999998600000099999999999999999764330000000000"
        "99999999999996420000000000000000999999999996100000000000000000009999999999300000000000"
        "00000000009999999997000000000000000000000099999999930000000000000000000000999999999000"
        "000000000000000000009999999980000000000000000000000099999999600000000000000000",
        [
            0.19245,
            0.20188,
            0.20600,
            0.22719,
            0.42938,
            0.44083,
            0.17936,
            0.19128,
            0.22136,
            0.23947,
            0.41587,
            0.43656,
            0.16611,
            0.17890,
            0.23903,
            0.25685,
            0.39693,
            0.42316,
            0.15481,
            0.16804,
            0.25758,
            0.27584,
            0.37695,
            0.40202,
            0.14613,
            0.15970,
            0.27670,
            0.29573,
            0.35673,
            0.38038,
            0.14065,
            0.15444,
            0.29624,
            0.31616,
            0.33662,
            0.35882,
            0.13877,
            0.15264,
            0.31470,
            0.31745,
            0.33691,
            0.33821,
            0.14065,
            0.15444,
            0.29624,
            0.31616,
            0.33662,
            0.35882,
            0.14613,
            0.15970,
            0.27670,
            0.29573,
            0.35673,
            0.38038,
            0.15481,
            0.16804,
            0.25758,
            0.27584,
            0.37695,
            0.40202,
            0.16611,
            0.17890,
            0.23903,
            0.25685,
            0.39693,
            0.42316,
            0.17936,
            0.19128,
            0.22136,
            0.23947,
            0.41587,
            0.43656,
            0.19245,
            0.20188,
            0.20600,
            0.22719,
            0.42938,
            0.44083,
        ],
        [
            1.51541,
            1.66742,
            1.82188,
            1.97676,
            2.13245,
            2.28982,
            2.44874,
            2.61203,
            2.78959,
            2.99365,
            3.25587,
            2.76408,
            3.24821,
            3.47938,
            3.64722,
            3.80762,
            3.97463,
            4.15580,
            4.37783,
            4.64777,
            4.41652,
            4.43115,
            4.62714,
            4.97639,
            5.13896,
            5.31424,
            5.47829,
            5.60480,
            5.76299,
            5.92184,
        ],
    ),
}

X_OF_LABELS = 1.2 / 499 * torch.arange(400, dtype=torch.float64)


@pytest.mark.parametrize("key", PHOTONICS_NT_XENT)
def test_photonics_nt_xent_equals_the_authors(key):
    n, d, a1, b1, a2, b2 = key
    z1, z2 = wave(n, d, a1, b1).requires_grad_(), wave(n, d, a2, b2).requires_grad_()
    loss = photonics_reg.nt_xent(z1, z2, 0.1)
    loss.backward()
    assert (loss.item(), z1.grad.norm().item(), z2.grad.norm().item()) == pytest.approx(
        PHOTONICS_NT_XENT[key], rel=1e-6
    )


def test_dos_error_equals_the_authors():
    target = wave(6, 400, 0.2, 0.01).abs() + 1
    prediction = target + 0.1 * wave(6, 400, 0.5, 0.03)
    error = photonics_reg.dos_error(prediction, target)
    assert error == pytest.approx(0.039136776600480754, rel=1e-12)
    prediction[:, :100] += 5  # these points do not count
    assert photonics_reg.dos_error(prediction, target) == pytest.approx(error, rel=1e-12)


def rods(n):
    """Rods of permittivity 8.9 and radius 0.2 a in air, each pixel the mean of 3 x 3 points."""
    line = (torch.arange(3 * n, dtype=torch.float64) + 0.5) / (3 * n) - 0.5
    inside = torch.hypot(line[:, None], line) < 0.2
    return F.avg_pool2d(torch.where(inside, 8.9, 1.0).double()[None], 3)


def test_bands_of_rods():
    """Against plane waves with the exact Fourier coefficients, |g| <= 18 (and MPB to 4e-5)."""
    k = torch.tensor([[0.0, 0.0], [0.5, 0.0], [0.5, 0.5]], dtype=torch.float64)
    want = torch.tensor(
        [
            [0, 0.582310, 0.627817, 0.627817],
            [0.274707, 0.442522, 0.635969, 0.772245],
            [0.322396, 0.548840, 0.548840, 0.693592],
        ]
    )
    for n, cutoff, bound in ((128, 7, 1e-3), (32, 5, 5e-3)):
        frequencies, _ = photonics_reg.photonic_bands(rods(n), k, 4, cutoff)
        assert ((frequencies[0] - want).abs() <= bound * want.clamp(min=1e-3)).all()
    low, high = frequencies[0, :, 0].max(), frequencies[0, :, 1].min()
    assert 2 * (high - low) / (high + low) == pytest.approx(0.314, abs=0.005)


def golden_cell(name):
    low, high, digits, frequencies, labels = MPB[name]
    levels = torch.tensor([int(digit) for digit in digits], dtype=torch.float64).view(1, 32, 32)
    eps = low + (high - low) * levels / 9
    return eps, torch.tensor(frequencies).view(13, 6).double(), torch.tensor(labels)


@pytest.mark.parametrize("name", MPB)
def test_labels_equal_mpbs(name):
    eps, want, labels = golden_cell(name)
    frequencies, _ = photonics_reg.photonic_bands(eps, photonics_reg.wave_vectors()[::50], 6)
    some = want > 0.05
    assert ((frequencies[0] - want).abs() < 2e-3 * want)[some].all() and some.sum() >= 77
    got = photonics_reg.density_of_states(eps)[0, 100::10]
    assert (got - labels).abs().sum() < 2e-3 * labels.sum()


def test_group_velocities_are_derivatives():
    eps, k = golden_cell("c_p1_1")[0], torch.tensor([[0.31, -0.17], [0.05, 0.42]]).double()
    _, velocities = photonics_reg.photonic_bands(eps, k, 5)
    for axis in (0, 1):
        step = torch.zeros(2, dtype=torch.float64)
        step[axis] = 1e-5
        ahead, behind = (photonics_reg.photonic_bands(eps, k + s * step, 5)[0] for s in (1, -1))
        assert torch.allclose(velocities[..., axis], (ahead - behind) / 2e-5, atol=1e-6)


def test_labels_are_invariant():
    eps = golden_cell("c_p1_1")[0]
    y = photonics_reg.density_of_states(eps, 3)
    for moved in (
        eps.roll((5, 9), (1, 2)),
        eps.flip(1),
        eps.flip(2),
        eps.rot90(1, (1, 2)),
        eps.mT,
        1.7 * eps,
    ):
        assert (photonics_reg.density_of_states(moved, 3) - y).abs().max() < 1e-10
    assert (photonics_reg.density_of_states(eps.roll(1, 1) * eps, 3) - y).abs().max() > 0.1


def test_a_homogeneous_cell_has_the_empty_lattices_labels():
    y = photonics_reg.density_of_states(torch.full((1, 32, 32), 6.0, dtype=torch.float64))
    empty = photonics_reg.empty_lattice(CPU)
    assert torch.allclose(empty.double(), 2 * math.pi * X_OF_LABELS, rtol=1e-6)
    assert photonics_reg.dos_error(y, empty[None].double()) < 2e-4


def test_states_are_distributed_exactly():
    """A trapezoid's integral, against many points of the square; nothing is lost or doubled."""
    frequencies = torch.tensor([0.3, 0.5, 0.52, 0.6], dtype=torch.float64)
    velocities = torch.tensor([[0.7, -0.2], [0.0, 0.5], [0.4, 0.4], [0, 0]], dtype=torch.float64)
    edges = torch.linspace(0.28, 0.62, 60, dtype=torch.float64)
    got = photonics_reg.states_below(edges, frequencies, velocities)
    line = ((torch.arange(400) + 0.5) / 400 - 0.5) / 25
    dk = torch.cartesian_prod(line, line).double()
    for f, v, below in zip(frequencies, velocities, got):
        want = ((f + dk @ v)[:, None] < edges).double().mean(0)
        assert torch.allclose(below, want, atol=0.01)
    eps, k = golden_cell("c_pm_1")[0], photonics_reg.wave_vectors()
    frequencies, velocities = photonics_reg.photonic_bands(eps, k, 6, 2)
    assert frequencies[0, 312, 0] < 1e-6 and k[312].abs().max() < 1e-12
    frequencies[0, 312, 0] = math.inf
    edges = torch.linspace(0, 1, 50, dtype=torch.float64)
    counts = photonics_reg.states_below(edges, frequencies, velocities).sum((1, 2)).diff() / 625
    assert counts.sum().item() == pytest.approx(6 - 1 / 625, abs=1e-10)
    assert (counts > -1e-12).all()


def test_the_label_is_the_smoothed_count_of_states():
    """All 625 wave vectors, fine bins, and the Gaussian by hand: time reversal and scales too."""
    eps, k = golden_cell("c_pm_2")[0], photonics_reg.wave_vectors()
    frequencies, velocities = photonics_reg.photonic_bands(eps, k, 6, 2)
    frequencies[0, 312, 0] = math.inf
    root = eps.mean().sqrt()
    edges = 0.0015 / 4 * torch.arange(2801, dtype=torch.float64)
    below = photonics_reg.states_below(edges, root * frequencies[0], root * velocities[0])
    counts, centers = below.sum((0, 1)).diff() / 625, (edges[1:] + edges[:-1]) / 2
    for j in (3, 150, 260, 399):
        x = X_OF_LABELS[j]
        weight = sum(torch.exp(-((x - s * centers) ** 2) / (2 * 0.01**2)) for s in (1, -1))
        want = (counts * weight).sum() / (0.01 * math.sqrt(2 * math.pi))
        got = photonics_reg.density_of_states(eps, 2)[0, j]
        assert got.item() == pytest.approx(want.item(), rel=2e-3, abs=2e-4)


@pytest.mark.parametrize(
    "eps, cutoff, word",
    (
        (torch.zeros(1, 32, 32), 4, "positive"),
        (torch.full((1, 32, 32), float("nan")), 4, "finite"),
        (torch.ones(1, 32, 31), 4, "(1, 32, 31)"),
        (torch.ones(32, 32), 4, "(32, 32)"),
        (torch.ones(1, 16, 16), 4, "n > 16"),
    ),
)
def test_impossible_permittivities_are_refused(eps, cutoff, word):
    with pytest.raises(ValueError, match=word.replace("(", r"\(").replace(")", r"\)")):
        photonics_reg.photonic_bands(eps, torch.zeros(1, 2), 2, cutoff)


def test_gpm_cells_follow_the_published_law():
    cells = photonics_reg.draw_cells("gpm", 40, 3)
    assert cells.shape == (40, 32, 32) and cells.dtype == torch.float64
    assert torch.equal(photonics_reg.draw_cells("gpm", 7, 3), cells[:7])
    assert torch.allclose(cells.flip(1), cells, rtol=1e-12)  # x -> -x, pixels symmetric about 0
    assert not torch.allclose(cells.flip(2), cells)
    mpb = photonics_reg.draw_cells("gpm", 40, 3, "mpb")
    assert torch.allclose(
        mpb[:, 1:].flip(1), mpb[:, 1:], rtol=1e-12
    )  # about row 16, and about row 0
    assert 1 <= cells.min() and cells.max() <= 20
    # the first cell by the definition: complex Fourier sum, quantile, mean of 3 x 3 points
    drawn = torch.rand(40, 16, generator=torch.Generator().manual_seed(3), dtype=torch.float64)[0]
    eps_in, eps_out = 1 + 19 * drawn[14].item(), 1 + 19 * drawn[15].item()

    def field(x, y):
        value = 0
        for g1 in (-1, 0, 1):
            for i, g2 in enumerate((-1, 0, 1)):
                r, phi = drawn[3 * abs(g1) + i], 2 * math.pi * drawn[6 + 3 * abs(g1) + i]
                value = value + r * torch.exp(1j * (phi + 2 * math.pi * (g1 * x + g2 * y)))
        return value.real

    ends = torch.linspace(-0.5, 0.5, 50, dtype=torch.float64)
    level = np.quantile(field(*torch.meshgrid(ends, ends, indexing="ij")), 0.01 + 0.98 * drawn[12])
    for i, j in ((0, 0), (3, 17), (9, 20), (16, 5), (31, 31)):
        for grid, image, start in (("centered", cells, 0.5), ("mpb", mpb, 0)):
            x, y = (-0.5 + (i + start) / 32, -0.5 + (j + start) / 32)
            points = [
                eps_in
                if field(torch.tensor(x + a / 96), torch.tensor(y + b / 96)) > level
                else eps_out
                for a in (-1, 0, 1)
                for b in (-1, 0, 1)
            ]
            assert image[0, i, j].item() == pytest.approx(sum(points) / 9, rel=1e-9), (grid, i, j)
    share = [(c == c[0, 0]).double().mean() for c in cells]
    assert min(share) < 0.3 and max(share) > 0.7  # fillings differ


def test_blob_cells_have_one_centered_inclusion():
    cells = photonics_reg.draw_cells("blob", 30, 4)
    drawn = torch.rand(30, 16, generator=torch.Generator().manual_seed(4), dtype=torch.float64)
    assert torch.equal(photonics_reg.draw_cells("blob", 5, 4), cells[:5])
    for cell, u in zip(cells, drawn):
        eps_in, eps_out = 1 + 19 * u[14], 1 + 19 * u[15]
        assert cell[15, 15] == pytest.approx(eps_in.item(), rel=1e-9)
        assert cell[0, 0] == pytest.approx(eps_out.item(), rel=1e-9)
        # area of the star, over 3 x 3 points of each pixel
        theta = torch.linspace(0, 2 * math.pi, 2001, dtype=torch.float64)[:-1]
        r = 1 + sum(
            0.3 / n * (2 * u[n] - 1) * torch.cos(n * theta + 2 * math.pi * u[4 + n])
            for n in range(1, 5)
        )
        r = ((0.1 + 0.3 * u[0]) * r).clamp(max=0.48)
        area = (r**2 / 2).mean() * 2 * math.pi
        got = ((cell - eps_out) / (eps_in - eps_out)).mean()
        assert got.item() == pytest.approx(area.item(), abs=0.01)


def test_views_of_cells():
    """Against torch's own flip, rot90 and roll, one by one; and the law of the draws."""
    cells = torch.rand(60, 32, 32)
    for kind in ("gpm", "blob"):
        for transformed in (False, True):
            drawn = photonics_reg.draw_symmetries(60, kind, transformed, CPU)
            got = photonics_reg.apply_symmetries(cells, drawn)
            for cell, view, shift, flip, turn in zip(cells, got, *drawn.values()):
                want = cell if flip == 0 else cell.flip(int(flip) - 1)
                want = want.rot90(int(turn)).roll(tuple(shift.tolist()), (0, 1))
                assert torch.equal(view, want)
    many = {
        (kind, t): photonics_reg.draw_symmetries(30_000, kind, t, CPU)
        for kind in ("gpm", "blob")
        for t in (False, True)
    }
    share = lambda x, n: x.flatten().bincount(minlength=n) / x.numel()
    for drawn in many.values():
        assert torch.allclose(share(drawn["flip"], 3), torch.full((3,), 1 / 3), atol=0.02)
    for t in (False, True):
        assert torch.allclose(
            share(many["gpm", t]["shift"], 32), torch.full((32,), 1 / 32), atol=0.01
        )
        assert torch.allclose(share(many["blob", t]["turn"], 4), torch.full((4,), 0.25), atol=0.02)
    assert (many["gpm", False]["turn"] == 0).all() and (many["blob", False]["shift"] == 0).all()
    assert torch.allclose(share(many["gpm", True]["turn"], 4), torch.full((4,), 0.25), atol=0.02)
    half = share(many["blob", True]["shift"], 17)
    assert half[0] == pytest.approx(0.5, abs=0.02) and half[16] == pytest.approx(0.5, abs=0.02)


def test_versions_of_the_pretext_task():
    cells = torch.rand(3, 32, 32)
    turned, shifted = photonics_reg.versions(cells, "gpm"), photonics_reg.versions(cells, "blob")
    for k in range(4):
        assert torch.equal(turned[3 * k : 3 * k + 3], cells.rot90(k, (1, 2)))
        assert torch.equal(
            shifted[3 * k : 3 * k + 3], cells.roll((16 * (k // 2), 16 * (k % 2)), (1, 2))
        )


def test_four_classes_are_told_apart_by_the_parity_of_rows_on_mpbs_grid_only():
    def mirrors(cell):
        """The axes and planes (2 x their place in pixels) about which a cell is symmetric."""
        return {
            (axis, plane)
            for axis in (0, 1)
            for plane in range(32)
            if torch.allclose(cell.flip(axis).roll(plane + 1, axis), cell)
        }

    for grid, classes in (("mpb", 4), ("centered", 2)):
        cells = photonics_reg.draw_cells("gpm", 12, 5, grid)
        kinds = [
            {frozenset(mirrors(c)) for c in photonics_reg.versions(cells, "gpm").split(12)[k]}
            for k in range(4)
        ]
        assert all(len(kind) == 1 for kind in kinds)
        assert len({kind.pop() for kind in kinds}) == classes


def test_photonics_networks_have_the_released_sizes():
    count = lambda net: sum(p.numel() for p in net.parameters())
    config = photonics_reg.Config(classes=4)
    method = photonics_reg.Method(config)
    assert count(method.encoder) == 5_331_712 and count(method.projector) == 919_808
    assert count(method.predictor) == 790_532 and method.regressor is None
    tuned = photonics_reg.Method(config, "essl", 1)
    assert count(tuned.regressor) == 2_829_200 and tuned.projector is tuned.predictor is None
    assert method.encoder(torch.rand(2, 1, 32, 32)).shape == (2, 1024)


def photonics_method(mode, *flags, split=0):
    line = ["--arch", "small", "--dataset", "gpm", *flags]
    config = photonics_reg.parse_args(line)
    cells = photonics_reg.draw_cells(config.dataset, 10, 6, config.grid).float()
    return photonics_reg.Method(config, mode, split), cells


@pytest.mark.parametrize("flags", ([], ["--dataset", "blob"], ["--classes", "4", "--grid", "mpb"]))
@pytest.mark.parametrize("mode", ("simclr", "simclr+transform", "essl"))
def test_photonics_pretraining_is_the_algorithm(mode, flags):
    method, cells = photonics_method(mode, *flags)
    kind, classes = method.config.dataset, method.config.classes
    torch.manual_seed(1)
    loss, terms = method(cells, torch.full((10,), -1))
    torch.manual_seed(1)
    z = [
        method.projector(
            method.encoder((photonics_reg.apply_symmetries(cells, drawn)[:, None] - 1) / 19)
        )
        for drawn in (
            photonics_reg.draw_symmetries(10, kind, mode == "simclr+transform", CPU)
            for _ in range(2)
        )
    ]
    want = photonics_reg.nt_xent(*z, 0.1)
    assert terms["invariance"].item() == pytest.approx(want.item(), rel=1e-5)
    if mode == "essl":
        logits = method.predictor(
            method.encoder((photonics_reg.versions(cells, kind)[:, None] - 1) / 19)
        ).log_softmax(1)
        target = [k % 2 if classes == 2 else k for k in range(4)]
        assert logits.shape == (40, classes)
        want = (
            want - 5 * sum(logits[10 * k + i, target[k]] for k in range(4) for i in range(10)) / 40
        )
    assert loss.item() == pytest.approx(want.item(), rel=1e-5)
    loss.backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in method.parameters())


def test_photonics_fine_tuning_is_a_regression_of_the_difference():
    method, cells = photonics_method("simclr", split=1)
    labels = torch.rand(10, 400)
    torch.manual_seed(1)
    loss, _ = method(cells, labels)
    torch.manual_seed(1)
    view = photonics_reg.apply_symmetries(
        cells, photonics_reg.draw_symmetries(10, "gpm", False, CPU)
    )
    output = method.regressor(method.encoder((view[:, None] - 1) / 19))
    want = ((output - (labels - 2 * math.pi * X_OF_LABELS.float())) ** 2).mean()
    assert loss.item() == pytest.approx(want.item(), rel=1e-5)
    optimizer = photonics_reg.make_optimizer(method, method.config)
    assert isinstance(optimizer, torch.optim.Adam)
    assert (optimizer.defaults["lr"], optimizer.defaults["weight_decay"]) == (1e-4, 1e-5)
    got = photonics_reg.predict(method, cells)
    method.eval()
    output = method.regressor(method.encoder((cells[:, None] - 1) / 19))
    assert torch.allclose(got, output + 2 * math.pi * X_OF_LABELS.float(), atol=1e-5)


def test_a_frozen_encoder_stays_as_it_is():
    method, cells = photonics_method("simclr", "--frozen", split=1)
    before = {name: value.clone() for name, value in method.encoder.state_dict().items()}
    optimizer = photonics_reg.make_optimizer(method, method.config)
    method(cells, torch.rand(10, 400))[0].backward()
    optimizer.step()
    after = method.encoder.state_dict()
    for name in before:  # but BatchNorm's statistics go on, as in the authors' code
        assert torch.equal(before[name], after[name]) != ("running" in name or "tracked" in name)
    assert all(p.grad is not None for p in method.regressor.parameters())


def test_pretext_accuracy():
    method, cells = photonics_method("essl")

    class Oracle(torch.nn.Module):
        def forward(self, features):
            right = torch.arange(4).repeat_interleave(10) % 2
            right[:10] = 1  # wrong for the first of four versions
            return torch.nn.functional.one_hot(right, 2).float()

    method.predictor = Oracle()
    assert photonics_reg.pretext_accuracy(method, cells) == 75
    assert method.training


def test_photonics_splits_are_disjoint_and_differ():
    config = photonics_reg.parse_args(["--limit", "60"])
    pool = torch.arange(70.0)[:, None, None].repeat(1, 2, 2), torch.arange(70.0)
    data = (None, pool, "test", 0.0)
    seen = []
    for split in (1, 2, 3):
        settings, (train, validation, test) = photonics_reg.stage_of(config, data, split)
        assert sorted([*train[1].tolist(), *validation[1].tolist()]) == list(range(70))
        assert len(train[1]) == 60 and test == "test" and (train[0][:, 0, 0] == train[1]).all()
        assert (settings.epochs, settings.batch_size, settings.final_lr) == (100, 64, 1.0)
        assert settings.seed == split
        seen.append(set(train[1].tolist()))
    assert seen[0] != seen[1] != seen[2] != seen[0]
    settings, _ = photonics_reg.stage_of(config, data, 0)
    assert (settings.epochs, settings.batch_size, settings.seed) == (200, 256, 0)


def test_stages_of_a_run():
    stages = lambda *line: photonics_reg.stages(photonics_reg.parse_args(line))
    assert stages("--splits", "2") == [("essl", 0), ("essl", 1), ("essl", 2)]
    assert stages("--mode", "supervised", "--splits", "1") == [("supervised", 1)]
    assert stages("--pretrained", "x/checkpoint.pt", "--splits", "1") == [("essl", 1)]
    modes = [mode for mode, _ in stages("--mode", "all", "--splits", "1")]
    assert modes == ["supervised", *["simclr"] * 2, *["simclr+transform"] * 2, *["essl"] * 2]


def test_a_photonics_run_of_all_modes(tmp_path, capsys):
    line = tiny_photonics(tmp_path / "run", "--mode", "all", "--splits", "2")
    photonics_reg.main(line)
    results = json.loads((tmp_path / "run" / "results.json").read_text())
    log = [json.loads(x) for x in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()[1:]]
    for mode in photonics_reg.MODES:
        errors = [
            [
                (x["validation_error"], x["test_error"])
                for x in log
                if (x["mode"], x["split"]) == (mode, s)
            ]
            for s in (1, 2)
        ]
        assert [len(e) for e in errors] == [3, 3]
        last, best = [e[-1][1] for e in errors], [min(e)[1] for e in errors]
        least = [min(t for _, t in e) for e in errors]
        for name, want in (
            ("dos_error", last),
            ("dos_error_at_best_validation", best),
            ("dos_error_test_minimum", least),
        ):
            assert results[mode][name] == pytest.approx(np.mean(want), rel=1e-5)
            assert results[mode][name + "_std"] == pytest.approx(np.std(want), rel=1e-3, abs=1e-5)
    assert results["dos_error"] == results["essl"]["dos_error"]
    assert results["dos_error_supervised"] == results["supervised"]["dos_error"]
    config = photonics_reg.parse_args(line)
    cells, labels = photonics_reg.load_data(config, CPU)[2]
    assert results["images_per_second"] == log[-1]["cells_per_second"]
    empty = photonics_reg.dos_error(photonics_reg.empty_lattice(CPU).expand(8, -1), labels)
    assert results["dos_error_empty_lattice"] == pytest.approx(100 * empty)
    direct = photonics_reg.density_of_states(photonics_reg.draw_cells("gpm", 8, 2), 1)
    assert torch.allclose(labels, direct.float())
    assert 0 <= results["transform_top1"] <= 100
    picture = (tmp_path / "run" / "spectra.svg").read_text()
    assert (
        xml.etree.ElementTree.fromstring(picture) is not None and picture.count("<polyline") == 12
    )
    # the last stage's own error, from its checkpoint
    capsys.readouterr()
    photonics_reg.main(
        ["--eval", str(tmp_path / "run" / "checkpoint.pt"), "--data-root", str(tmp_path)]
    )
    again = json.loads(capsys.readouterr().out)
    assert again["dos_error"] == pytest.approx(log[-1]["test_error"], rel=1e-5)
    # the same encoders, frozen, without another pre-training
    pretrained = ["--frozen", "--pretrained", str(tmp_path / "run" / "checkpoint.pt")]
    other = tiny_photonics(tmp_path / "frozen", "--mode", "simclr", *pretrained)
    photonics_reg.main(other)
    saved = [
        torch.load(tmp_path / x / "checkpoint.pt", weights_only=True) for x in ("run", "frozen")
    ]
    for name, value in saved[0]["state"]["encoders"]["simclr"].items():
        if "running" not in name and "tracked" not in name:
            assert torch.equal(saved[1]["method"]["encoder." + name], value)
    other = tiny_photonics(tmp_path / "x", "--mode", "simclr", *pretrained, "--arch", "paper")
    line = fails(capsys, 2, *other, script=photonics_reg)
    assert "--arch" in line


def test_computed_labels_are_kept(tmp_path, monkeypatch, capsys):
    config = photonics_reg.parse_args(["--cutoff", "1", "--data-root", str(tmp_path)])
    cells, labels, _ = photonics_reg.labelled_cells(config, 6, 1, CPU)
    assert torch.equal(cells, photonics_reg.draw_cells("gpm", 6, 1).float())
    calls, solve = [], photonics_reg.density_of_states
    monkeypatch.setattr(
        photonics_reg, "density_of_states", lambda *args: calls.append(1) or solve(*args)
    )
    again = photonics_reg.labelled_cells(config, 6, 1, CPU)[1]
    assert torch.equal(again, labels) and not calls
    assert torch.equal(photonics_reg.labelled_cells(config, 4, 1, CPU)[1], labels[:4]) and not calls
    more = photonics_reg.labelled_cells(config, 9, 1, CPU)[1]
    assert torch.equal(more[:6], labels) and len(more) == 9 and len(calls) == 3
    (path,) = (tmp_path / "photonics").glob("*.pt")
    sound = torch.load(path, weights_only=True)
    for damage in (
        lambda: path.write_bytes(path.read_bytes()[:500]),
        lambda: torch.save(sound | {"labels": torch.rand(9, 5)}, path),
        lambda: torch.save(sound | {"labels": labels / 0}, path),
        lambda: torch.save(sound | {"made_by": [25, 6, 0.02]}, path),
        lambda: torch.save([1], path),
    ):
        damage()
        out = tmp_path / "run"
        line = tiny_photonics(out, "--data-root", tmp_path)
        assert str(path) in fails(capsys, 2, *line, script=photonics_reg)


def test_any_seed_can_be_fine_tuned(tmp_path):
    """Also a date; and the draws of different seeds and splits differ."""
    seeds = set()
    for seed in ("0", "1", "20261121", "4294967295"):
        config = photonics_reg.parse_args(tiny_photonics(tmp_path / "run", "--seed", seed))
        cells = photonics_reg.draw_cells("gpm", 40, 0).float(), torch.zeros(40, 400)
        for split in (1, 2):
            tuned, parts = photonics_reg.stage_of(config, (cells, cells, cells, 0.0), split)
            next(photonics_reg.batches(parts, tuned, 3, 0, CPU))
            seeds.add(tuned.seed)
    assert len(seeds) == 8


def test_eval_of_a_run_stopped_in_its_first_epoch(tmp_path, monkeypatch, capsys):
    line = tiny_photonics(tmp_path / "run", "--mode", "supervised", "--save-every", "0")
    dos_error = lambda *args: signal.raise_signal(signal.SIGTERM) or 0.5
    monkeypatch.setattr(photonics_reg, "log_epoch", lambda *args: dos_error())
    with pytest.raises(SystemExit):
        photonics_reg.main(line)
    monkeypatch.undo()
    capsys.readouterr()
    checkpoint = str(tmp_path / "run" / "checkpoint.pt")
    photonics_reg.main(["--eval", checkpoint, "--data-root", str(tmp_path)])
    printed = capsys.readouterr().out
    assert json.loads(printed[printed.index("{") :])["images_per_second"] is None


PHOTONICS_BAD = {
    "an unknown crystal": (["--dataset", "hex"], "hex"),
    "an unknown mode": (["--mode", "byol"], "byol"),
    "three classes": (["--classes", "3"], "--classes of gpm is 2 or 4"),
    "two classes of blob": (["--dataset", "blob", "--classes", "2"], "--classes of blob is 4"),
    "too many plane waves": (["--cutoff", "8"], "--cutoff is at most 7"),
    "no plane waves": (["--cutoff", "0"], "--cutoff is"),
    "a batch that is too large": (["--batch-size", "65"], "--batch-size 65"),
    "a tuning batch that is too large": (["--tune-batch-size", "33"], "--tune-batch-size 33"),
    "no labels": (["--limit", "0"], "--limit is"),
    "no splits": (["--splits", "0"], "--splits is"),
    "a negative alpha": (["--alpha", "-1"], "--alpha is"),
    "no pre-trained encoders": (["--pretrained", "nowhere.pt"], "nowhere.pt"),
    "no folder for labels": (["--data-root", "/dev/null/data"], "--data-root"),
    "no grid": (["--grid", "yee"], "yee"),
}


@pytest.mark.parametrize("name", PHOTONICS_BAD)
def test_photonics_bad_input(name, tmp_path, capsys):
    flags, word = PHOTONICS_BAD[name]
    line = fails(capsys, 2, *tiny_photonics(tmp_path / "run"), *flags, script=photonics_reg)
    assert word in line and not (tmp_path / "run" / "metrics.jsonl").exists()


def test_a_pretraining_has_no_errors_to_evaluate(tmp_path, monkeypatch, capsys):
    loss, calls = photonics_reg.nt_xent, []

    def interrupted(*args):
        calls.append(1)
        if len(calls) == 3:  # two are the forecast's
            signal.raise_signal(signal.SIGINT)
        return loss(*args)

    monkeypatch.setattr(photonics_reg, "nt_xent", interrupted)
    out = tmp_path / "run"
    with pytest.raises(SystemExit):
        photonics_reg.main(tiny_photonics(out))
    line = ["--eval", out / "checkpoint.pt", "--data-root", tmp_path]
    capsys.readouterr()
    assert "pre-training" in fails(capsys, 2, *line, script=photonics_reg)


def test_fine_tuning_starts_from_the_pretrained_encoder(tmp_path, monkeypatch):
    starts, fit = {}, photonics_reg.fit

    def spied(method, optimizer, data, config, state, device):
        before = {name: value.clone() for name, value in method.encoder.state_dict().items()}
        starts[method.mode, method.split] = before
        fit(method, optimizer, data, config, state, device)
        if method.split == 0:
            settings[method.mode] = config, optimizer

    settings = {}
    monkeypatch.setattr(photonics_reg, "fit", spied)
    line = tiny_photonics(tmp_path / "run", "--mode", "all", "--splits", "2")
    photonics_reg.main(line)
    saved = torch.load(tmp_path / "run" / "checkpoint.pt", weights_only=True)["state"]["encoders"]
    assert saved.keys() == {"simclr", "simclr+transform", "essl"}
    for mode, encoder in saved.items():
        assert any(not torch.equal(starts[mode, 0][name], encoder[name]) for name in encoder)
        for split in (1, 2):
            assert all(torch.equal(starts[mode, split][name], encoder[name]) for name in encoder)
    config, optimizer = settings["essl"]
    assert config == photonics_reg.parse_args(line) or config.mode == "all"
    assert (config.final_lr, config.warmup_epochs, config.lr) == (0.0, 0, 0.01)
    assert isinstance(optimizer, torch.optim.SGD)
    assert (optimizer.defaults["lr"], optimizer.defaults["momentum"]) == (0.01, 0.9)
    frozen = tiny_photonics(tmp_path / "moved", "--pretrained", str(tmp_path / "from.pt"))
    shutil.copy(tmp_path / "run" / "checkpoint.pt", tmp_path / "from.pt")
    photonics_reg.main(frozen)
    (tmp_path / "from.pt").unlink()  # the checkpoint holds what it needs
    line = ["--eval", str(tmp_path / "moved" / "checkpoint.pt"), "--data-root", str(tmp_path)]
    photonics_reg.main(line)


def test_photonics_networks_have_the_released_layers():
    method = photonics_reg.Method(photonics_reg.Config())
    kinds = [type(layer).__name__ for layer in method.encoder]
    block = ["Conv2d", "BatchNorm2d", "ReLU", "MaxPool2d"]
    assert kinds == block * 3 + ["Flatten", "Linear", "ReLU", "Linear"]
    assert [method.encoder[i].kernel_size for i in (3, 7, 11)] == [2, 4, 4]
    assert method.encoder[0].padding == (3, 3) and method.encoder[0].padding_mode == "zeros"
    tuned = photonics_reg.Method(photonics_reg.Config(), "essl", 1)
    assert [type(x).__name__[0] for x in tuned.regressor] == list("LRLRLRL")
    x, head = torch.rand(8, 1024), method.projector.eval()
    want = head.last(F.relu(head.norm(head.second(F.relu(head.norm(head.first(x)))))))
    assert torch.allclose(head(x), want, atol=1e-6)


def test_fine_tuning_uses_the_views_of_its_mode():
    method, cells = photonics_method("simclr+transform", split=1)
    labels = torch.rand(10, 400)
    torch.manual_seed(1)
    loss, _ = method(cells, labels)
    torch.manual_seed(1)
    drawn = photonics_reg.draw_symmetries(10, "gpm", True, CPU)
    assert (drawn["turn"] > 0).any()
    output = method.regressor(method.features(photonics_reg.apply_symmetries(cells, drawn)))
    want = F.mse_loss(output + photonics_reg.empty_lattice(CPU), labels)
    assert loss.item() == pytest.approx(want.item(), rel=1e-5)


def test_alpha_weighs_the_pretext_task():
    method, cells = photonics_method("essl", "--alpha", "2")
    loss, terms = method(cells, torch.full((10,), -1))
    want = terms["invariance"] + 2 * terms["equivariance"]
    assert loss.item() == pytest.approx(want.item(), rel=1e-5)


def test_photonics_data_of_the_three_sets(tmp_path):
    """Of one grid, without a cell in common; and blob's half shifts in both directions alone."""
    line = tiny_photonics(tmp_path / "run", "--grid", "mpb")
    unlabelled, pool, test, _ = photonics_reg.load_data(photonics_reg.parse_args(line), CPU)
    for (cells, labels), n, seed in ((unlabelled, 64, 99), (pool, 37, 1), (test, 8, 2)):
        assert torch.equal(cells, photonics_reg.draw_cells("gpm", n, seed, "mpb").float())
        assert len(labels) == n
    direct = photonics_reg.density_of_states(pool[0][:2].double(), 1)
    assert torch.allclose(pool[1][:2], direct.float(), atol=1e-3)
    assert len(torch.cat([unlabelled[0], pool[0], test[0]]).unique(dim=0)) == 64 + 37 + 8
    shifts = photonics_reg.draw_symmetries(200, "blob", True, CPU)["shift"]
    assert len(shifts.unique(dim=0)) == 4


# --------------------------------------------------------------------------------- fault campaign

# A short form runs with the other tests. By hand, with its counts:
# CAMPAIGN=20 python -m pytest -s -k campaign test_all.py
CAMPAIGN = int(os.environ.get("CAMPAIGN", 1))

# Runs a command line of a script in a forked child, which the given signals hit after the given
# seconds, and whose files cannot grow over a size. Answers with exit code, seconds and output.
ARENA = """
import importlib, json, os, resource, signal, sys, time
script = importlib.import_module(sys.argv[1])
for line in sys.stdin:
    argv, blows, size = json.loads(line)
    begun, child = time.perf_counter(), os.fork()
    if child == 0:
        os.setpgrp()
        for name, stream in (("out", 1), ("err", 2)):
            os.dup2(os.open(sys.argv[2] + name, os.O_CREAT | os.O_TRUNC | os.O_WRONLY), stream)
        if size:
            resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))
        script.main(argv)
        sys.exit()
    code = None
    while code is None:
        done, status = os.waitpid(child, os.WNOHANG)
        code = os.waitstatus_to_exitcode(status) if done else None
        passed = time.perf_counter() - begun
        if blows and passed >= blows[0][0] and not done:
            number = blows.pop(0)[1]  # Ctrl-C reaches the processes that read images, too
            (os.kill if number == signal.SIGKILL else os.killpg)(child, number)
        time.sleep(0.001)
    print(json.dumps([code, passed, *(open(sys.argv[2] + x).read() for x in ("out", "err"))]),
          flush=True)
"""


def streamed(out, *flags):
    """tiny for images that are read from a folder, by processes of their own."""
    root = Path(out).parent / "images"
    for i in range(0 if root.exists() else 40):
        path = root / "train" / f"class{i % 2}" / f"{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        save_image(torch.rand(3, 20, 20, generator=torch.Generator().manual_seed(i)), path)
    line = tiny(out, "--arch", "small", "--size", "16", "--small-size", "8", "--batch-size", "8")
    line += ["--limit", "0", "--dataset", "folder", "--data-root", str(root), *flags]
    return [word for word in line if word != "--quick"]


ARENAS = {
    **{name: (name, line) for name, line in TINY.items()},
    "folder": ("simclr_essl", streamed),
}


@pytest.fixture(
    scope="module", params=ARENAS if CAMPAIGN > 1 else ["simclr_essl", "photonics_reg", "folder"]
)
def arena(request, tmp_path_factory):
    """What the tests of a campaign need: run(out, blows, size), and a run that was not disturbed."""
    (script, line), folder = ARENAS[request.param], tmp_path_factory.mktemp("arena")
    process = subprocess.Popen(
        [sys.executable, "-c", ARENA, script, str(folder / "std")],
        cwd=HERE,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )

    def run(out, blows=(), size=0):
        out.parent.mkdir(exist_ok=True)
        argv = line(out, "--save-every", "0")
        process.stdin.write(json.dumps([argv, blows, size]) + "\n")
        process.stdin.flush()
        code, seconds, printed, problem = json.loads(process.stdout.readline())
        words = problem.strip().splitlines()
        # a killed run's readers may complain before they end, and one just forked gets the signal, too
        if not (blows and request.param == "folder"):
            assert "Traceback" not in problem, problem
            assert len(words) in ((0, 1) if code < 0 else (code > 0,)), problem
            assert not words or words[0].startswith("error: "), problem
        run.seconds = seconds if code == 0 else run.seconds  # of the last run that came to its end
        return code, seconds, printed

    whole = folder / "whole" / "run"
    run.name, run.line, run.whole, run.seconds = request.param, line, whole, 0
    assert run(whole)[0] == 0
    run.random = random.Random(0)
    yield run
    process.stdin.close()
    process.wait()


def unharmed(out, whole):
    """The run's tensors are those of the undisturbed one, and its files are there and whole."""
    json.loads((out / "results.json").read_text())
    names = [{path.name for path in run.iterdir()} for run in (out, whole)]
    leftovers = {name for name in names[0] if re.search(r"\.\d+$", name)}  # of a kill while writing
    return same(out, whole) and names[0] - leftovers == names[1]


def same(out, whole):
    """same_run of the first form, same_end of the second."""
    saved = torch.load(whole / "checkpoint.pt", weights_only=True)
    return (same_run if "state" in saved else same_end)(out, whole)


def test_campaign_of_kills(arena, tmp_path):
    """SIGKILL at random moments, until the run has come to its end all the same; and again."""
    kills = runs = 0
    while kills < CAMPAIGN:
        out = tmp_path / f"killed{runs}" / "run"
        while arena(out, [(arena.random.uniform(0, arena.seconds), signal.SIGKILL)])[0]:
            kills += 1
        runs += 1
        assert unharmed(out, arena.whole)
    print(f"\n{arena.name}: {kills} kills, {runs} runs, all ended as the undisturbed one")


def test_campaign_of_signals(arena, tmp_path):
    """Ctrl-C or SIGTERM at random moments, and a second time soon after."""
    codes = []
    for i in range(CAMPAIGN):
        out, number = tmp_path / f"stopped{i}" / "run", (signal.SIGTERM, signal.SIGINT)[i % 2]
        first = arena.random.uniform(0.02, arena.seconds)
        second = first + arena.random.choice((0.001, 0.01, 0.1, 1))
        codes.append(arena(out, [(first, number), (second, number)])[0])
        assert codes[-1] in (0, 128 + number, -number)  # the last: Python was about to end
        assert arena(out)[0] == 0 and unharmed(out, arena.whole)
    stopped = sum(code != 0 for code in codes)
    print(f"\n{arena.name}: {stopped} of {len(codes)} runs stopped by two signals, none lost")


def test_campaign_of_full_disks(arena, tmp_path):
    """No file can grow over a random size; then there is room again."""
    if arena.name == "folder":
        pytest.skip("the limit would hold for the shared memory of its processes, too")
    largest, codes = (arena.whole / "checkpoint.pt").stat().st_size, []
    for i in range(CAMPAIGN):
        out = tmp_path / f"full{i}" / "run"
        arena.line(out)  # the images of a folder are there before
        codes.append(arena(out, size=int(largest ** arena.random.uniform(0.3, 1.02)))[0])
        assert codes[-1] in (0, 1)
        assert arena(out)[0] == 0 and unharmed(out, arena.whole)
    failed = sum(codes)
    print(f"\n{arena.name}: {failed} of {len(codes)} runs stopped by a full disk, none lost")


DAMAGES = {
    "gone": lambda path: path.unlink(),
    "empty": lambda path: path.write_bytes(b""),
    "half": lambda path: path.write_bytes(path.read_bytes()[: path.stat().st_size // 2]),
    "noise": lambda path: path.write_bytes(random.Random(1).randbytes(3000)),
    "a folder": lambda path: (path.unlink(), path.mkdir()),
}


def test_campaign_of_damaged_outputs(arena, tmp_path):
    """A damaged file is written anew, or refused in one line. Finished runs, and unfinished."""
    cases = [
        (path.name, damage, finished)
        for path in sorted(arena.whole.iterdir())
        for damage in DAMAGES
        for finished in (True, False)
    ]
    codes = []
    for name, damage, finished in arena.random.sample(cases, min(3 * CAMPAIGN - 2, len(cases))):
        out = tmp_path / f"{name}-{damage}-{finished}" / "run"
        shutil.copytree(arena.whole, out)
        DAMAGES[damage](out / name)
        if name == "results.json" and arena.name in ("simclr_essl", "folder"):
            (out / name).unlink()  # it is written whole, and only it says that a run is finished
        if not finished and name != "results.json":
            (out / "results.json").unlink()
        codes.append(arena(out)[0])
        assert codes[-1] in (0, 1, 2), (name, damage, finished)
        if codes[-1] == 0 and not finished and damage != "a folder":
            assert same(out, arena.whole), (name, damage)
    print(f"\n{arena.name}: of {len(codes)} damaged files {sum(map(bool, codes))} were refused")


NONSENSE = {
    int: ["-1", "0", "1.5", "nan", "", "9" * 20, "x", "1e3", "4294967296", "7"],
    float: ["-1", "0", "nan", "inf", "-inf", "", "1e400", "x", "1,5", "7"],
    str: [
        "",
        "x",
        "-",
        "--",
        "0",
        "-1",
        "1-0",
        "1,2",
        "/dev/null",
        "nowhere",
        "\0",
        "\u00e4" * 300,
    ],
    bool: ["", "1", "no"],
}


@pytest.mark.parametrize("name", TINY)
def test_campaign_of_bad_command_lines(name, tmp_path, monkeypatch, capsys):
    """One to three flags of a good line get nonsense: it is refused in one line, or would run."""
    script, draw = importlib.import_module(name), random.Random(name)
    last = "train" if script in SECOND else "fit"
    monkeypatch.setattr(script, last, lambda *args: sys.exit(0))
    monkeypatch.chdir(tmp_path)
    codes, flags = [], dataclasses.fields(script.Config)
    for i in range(17 * CAMPAIGN):
        line = TINY[name](tmp_path / f"run{i}" / "run")
        for field in draw.sample(flags, draw.choice((1, 1, 2, 3))):
            words = NONSENSE[field.type]
            if field.metadata["choices"]:
                words = words + list(field.metadata["choices"])
            flag = "--" + field.name.replace("_", "-")
            line += [flag] * (draw.random() < 0.9) + [draw.choice(words)] * (draw.random() < 0.9)
        with pytest.raises(SystemExit) as stop:
            script.main(line)
        lines, code = capsys.readouterr().err.strip().splitlines(), stop.value.code or 0
        assert code in (0, 1, 2) and len(lines) == (code > 0), (line, code, lines)
        assert code == 0 or lines[0].startswith("error: "), (line, lines)
        codes.append(code)
    assert sum(map(bool, codes)) > len(codes) / 2
    print(f"\n{name}: of {len(codes)} command lines {sum(map(bool, codes))} were refused")


def children(pid):
    """Processes that the process has started."""
    stats = [path.read_text() for path in Path("/proc").glob("[0-9]*/stat")]
    stats = [(int(stat.split()[0]), int(stat.rpartition(")")[2].split()[1])) for stat in stats]
    return [child for child, parent in stats if parent == pid]


def launch_two(script, out, port):
    line = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2"]
    line += [f"--master_port={port}", f"{script}.py", *TINY[script](out, "--save-every", "0")]
    out.parent.mkdir(exist_ok=True)
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    pipe = subprocess.PIPE
    return subprocess.Popen(line, cwd=HERE, env=env, stdout=pipe, stderr=pipe, text=True)


@pytest.mark.parametrize("script", TINY if CAMPAIGN > 1 else ["simclr_essl"])
def test_campaign_of_lost_processes(tmp_path, script):
    """One of two processes is killed: the other ends, too, and the same command continues."""
    port, draw = 22_000 + os.getpid() % 20_000, random.Random(script)
    whole = tmp_path / "whole" / "run"
    assert launch_two(script, whole, port).wait(120) == 0
    for i in range(max(1, CAMPAIGN // 10)):
        out = tmp_path / f"lost{i}" / "run"
        run = launch_two(script, out, port)
        while not (out / "checkpoint.pt").exists():
            assert run.poll() is None, run.stderr.read()
            time.sleep(0.01)
        time.sleep(draw.uniform(0, 0.5))
        both = children(run.pid)
        if len(both) == 2:
            os.kill(both[draw.randrange(2)], signal.SIGKILL)
        _, problem = run.communicate(timeout=120)
        assert run.returncode == (len(both) == 2), problem
        assert not any(Path(f"/proc/{pid}").exists() for pid in both)
        ours = [line for line in problem.splitlines() if line.startswith(("error: ", "[rank"))]
        assert len(ours) <= 1 and "[rank" not in "".join(ours), ours
        again = launch_two(script, out, port)
        _, problem = again.communicate(timeout=120)
        assert again.returncode == 0, problem
        assert unharmed(out, whole)
    print(f"\n{script}: {i + 1} times one of two processes was lost, and the run continued")


def first_image(root):
    images = sorted((root / "train" / "cat").iterdir())
    if not images:
        raise FileNotFoundError(root)
    return images[0]


FOLDER_FAULTS = {
    "nothing": lambda root: None,
    "no training images": lambda root: shutil.rmtree(root / "train"),
    "no validation images": lambda root: shutil.rmtree(root / "val"),
    "a file for a folder": lambda root: (
        shutil.rmtree(root / "val"),
        (root / "val").write_text("cat"),
    ),
    "an empty class": lambda root: (root / "train" / "zebra").mkdir(),
    "other classes": lambda root: (root / "val" / "cat").rename(root / "val" / "lion"),
    "no classes": lambda root: [
        image.rename(root / "train" / f"{image.parent.name}{image.name}")
        for image in [*(root / "train").rglob("*.jpg")]
    ],
    "few images": lambda root: shutil.rmtree(root / "train" / "dog"),
    "a text": lambda root: (root / "train" / "cat" / "a.jpg").write_text("no image"),
    "an empty image": lambda root: first_image(root).write_bytes(b""),
    "half an image": lambda root: first_image(root).write_bytes(
        first_image(root).read_bytes()[: first_image(root).stat().st_size // 2]
    ),
    "other files": lambda root: (root / "train" / "cat" / "list.csv").write_text("1,2"),
    "an image of one pixel": lambda root: save_image(
        torch.zeros(3, 1, 1), root / "val" / "cat" / "a.png"
    ),
    "a gray image": lambda root: T.ToPILImage()(torch.rand(1, 30, 40)).save(first_image(root)),
}
STREAMS = {
    "simclr_essl": FOLDER[:-1],
    "care": ["--dataset", "folder", "--projector", "32-16", "--chunks", "4"],
    "sfrik": ["--dataset", "imagenet", "--optimizer", "sgd", "--projector", "32-32"],
}


@pytest.mark.parametrize("name", STREAMS if CAMPAIGN > 1 else ["simclr_essl"])
def test_campaign_of_bad_folders(name, tmp_path, monkeypatch, capsys):
    """Image folders with two faults each: the run ends well, or with one line that says why."""
    script, draw, codes = importlib.import_module(name), random.Random(name), []
    if name != "simclr_essl":  # the evaluation of one script is enough
        monkeypatch.setattr(script, "evaluate", lambda *args: {})
    image_tree(tmp_path / "good", train__cat=110, train__dog=95, val__cat=9, val__dog=8)
    line = [*STREAMS[name], "--arch", "small", "--size", "72", "--batch-size", "64"]
    line += ["--epochs", "1", "--save-every", "0"]
    for i in range(CAMPAIGN):
        root, faults = tmp_path / f"bad{i}", draw.sample([*FOLDER_FAULTS], 2)
        shutil.copytree(tmp_path / "good", root)
        for fault in faults:
            try:
                FOLDER_FAULTS[fault](root)
            except OSError:  # what the second would damage, the first has taken away
                continue
        try:
            script.main([*line, "--data-root", str(root), "--out", str(root / "run")])
            codes.append(0)
        except SystemExit as stop:
            codes.append(stop.code)
        lines = capsys.readouterr().err.strip().splitlines()
        assert codes[-1] in (0, 1, 2) and len(lines) == (codes[-1] > 0), (faults, lines)
        assert not lines or lines[0].startswith("error: "), (faults, lines)
    print(f"\n{name}: of {len(codes)} bad folders {sum(map(bool, codes))} were refused")
