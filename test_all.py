"""Tests of the six scripts: python -m pytest -q test_all.py. No data, network or GPU is needed.

Golden values were printed by the authors' released code, in float64, for wave(n, d, a, b) below.
With a GPU, `-k cuda` is its share. Of what is the same text in several scripts one is tested.
"""
import ast
import base64
import functools
import inspect
import itertools
import json
import math
import os
import pickle
import re
import shutil
import signal
import socket
import struct
import subprocess
import sys
import tempfile
import threading
import time
import types
import unicodedata
import zlib
from dataclasses import fields
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch: two busy threads wait for each other

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import torchvision.transforms as T
import torchvision.transforms.functional as TF
from PIL import Image, PngImagePlugin
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torchvision import datasets, models
from torchvision.transforms import InterpolationMode
from torchvision.utils import save_image

import benchmark
import care
import compare
import homomorphic
import photonics_reg
import prepare
import sfrik
import simclr_essl
import simsiam_essl

HERE, CPU = Path(__file__).parent, torch.device("cpu")
of_scripts = lambda which: pytest.mark.parametrize("script", which, ids=lambda script: script.__name__)
# drawn and computed once for all tests: a second for patterns, five for chains, three for labels of cells
drawn, LABELS = functools.cache(simclr_essl.draw_patterns), tempfile.TemporaryDirectory()
care.draw_chains = functools.cache(lambda n, seed, draw=care.draw_chains: draw(min(n, 500), seed))
IMAGES = [simclr_essl, simsiam_essl, care, sfrik, homomorphic]
image_scripts = of_scripts(IMAGES)
cropping = of_scripts([simclr_essl, care, sfrik])  # with the three versions of augment
ALL = [*IMAGES, photonics_reg]  # for tests of what images and cells have in common
all_scripts = of_scripts(ALL)
for module in IMAGES:
    module.draw_patterns = drawn
# name: in how many versions it occurs, and why. What is not named is the same text wherever it occurs, so that one
# script of each version is enough to test it.
MAY_DIFFER = {
    "SCRIPT": (6, "the name of the script"),
    "Config": (6, "the method's flags"),
    "PRESETS": (6, "the paper's values"),
    "QUICK": (4, "the method's epochs; CARE's is for clouds, too"),
    "FREE": (2, "photonics_reg evaluates errors, not kNN"),
    "PHOTOS": (4, "the paper's datasets"),
    "Method": (6, "the method"),
    "view_arguments": (4, "the paper's augmentation"),
    "augment": (3, "CARE's chunks share a draw, its blur has a radius; SFRIK's jitter has a probability"),
    "make_encoder": (2, "E-SSL's residual branches start at zero for photographs, CARE's do not"),
    "make_projector": (5, "the paper's heads"),
    "make_predictor": (2, "the paper's heads"),
    "MEAN_STD": (4, "the paper's datasets"),
    "load_data": (5, "the paper's datasets"),
    "load_stl10": (2, "CARE trains on the labelled images, too"),
    "make_optimizer": (6, "the paper's optimiser"),
    "start": (2, "photonics_reg runs on one device"),
    "batches": (4, "CARE's processes draw the same views, as chunks may span them; cells and H-SSL have labels"),
    "train_epoch": (4, "SimSiam's h keeps its rate, as cells' fine-tuning does; that and H-SSL need labels"),
    "train": (3, "H-SSL's classifier needs labels; cells have stages, each with a method and an optimizer"),
    "draw_views": (4, "the method's views"),
    "middle": (3, "SFRIK evaluates STL-10 at 96 pixels; H-SSL trains on whole images, so it is evaluated on them"),
    "knn_accuracy": (3, "the temperature of the paper's protocol"),
    "linear_probe": (4, "the paper's protocol"),
    "probe": (4, "the paper's protocol"),
    "evaluate": (5, "the number of probes; CARE also evaluates clouds of points"),
    "parse_args": (4, "CARE has presets of MoCo, SFRIK of its baselines; cells have no photographs, but encoders"),
    "check": (6, "the method's rules"),
    "main": (2, "photonics_reg runs on one device, and up to four modes"),
    "finish": (4, "E-SSL's rotation and CARE's axes in the summary; photonics_reg's errors are in the log"),
}

def wave(n, d, a, b):
    i, j = torch.arange(n, dtype=torch.float64)[:, None], torch.arange(d, dtype=torch.float64)
    return torch.sin(a * i + b * j + 0.1 * i * j)

def golden(loss, key, want):
    """The loss of two waves, and the norms of its gradients, are those that the authors' code printed."""
    n, d, a1, b1, a2, b2 = key
    z1, z2 = wave(n, d, a1, b1).requires_grad_(), wave(n, d, a2, b2).requires_grad_()
    value = loss(z1, z2)
    value.backward()
    got = value.item(), z1.grad.norm().item(), 0.0 if z2.grad is None else z2.grad.norm().item()
    assert got == pytest.approx(want, rel=1e-6)

@pytest.fixture(autouse=True)
def fixed_seed():
    torch.manual_seed(0)

def column(*values):
    return torch.tensor(values)[:, None, None, None]

def spied_rates(script, monkeypatch):
    """A list that gets the rates of the optimiser's groups at every step."""
    rates, make = [], script.make_optimizer

    def spied(method, config):
        optimizer = make(method, config)
        step = optimizer.step
        optimizer.step = lambda: (rates.append([group["lr"] for group in optimizer.param_groups]), step())
        return optimizer

    monkeypatch.setattr(script, "make_optimizer", spied)
    return rates

SMALL = "--limit 128 --epochs 3 --batch-size 32 --knn-every 0 --lr 0.2 --warmup-epochs 1"
TINY = {
    "simclr_essl": f"{SMALL} --projector 32-32 --predictor 32-32",
    "simsiam_essl": f"{SMALL} --projector 32-32 --predictor 32-32",
    "care": f"{SMALL} --base moco --queue 100 --chunks 4 --lr 0.01 --projector 32-16",
    "sfrik": f"{SMALL} --projector 32-32",
    "homomorphic": f"{SMALL} --width 0.5",
    "photonics_reg": "--mode essl --cutoff 1 --limit 32 --test 8 --unlabelled 64 --batch-size 32 --epochs 2 --splits 2 "
                     f"--tune-batch-size 16 --tune-epochs 3 --eval-every 1 --data-root {LABELS.name}",
}

def tiny(script, out, *flags):
    """A second's command line: 12 steps of 3 epochs; photonics_reg: 4 steps, then 6 on each of two splits."""
    return ["--quick", *TINY[script.__name__].split(), "--out", str(out), *map(str, flags)]

tiny_photonics = functools.partial(tiny, photonics_reg)

@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """runs(script): the folder of an uninterrupted run of it, which is made once."""
    folder, done = tmp_path_factory.mktemp("runs"), {}

    def run(script):
        if script not in done:
            done[script] = folder / script.__name__
            script.main(tiny(script, done[script], "--save-every", "0"))
        return done[script]

    return run

def image_tree(root, **counts):
    """JPEG files of odd sizes: image_tree(root, train__cat=3) writes root/train/cat/0.jpg to 2.jpg."""
    for i, (folder, n) in enumerate(counts.items()):
        path = root / folder.replace("__", "/")
        path.mkdir(parents=True)
        for j, image in enumerate(sfrik.draw_patterns(n, i)[0].float() / 255):
            save_image(F.interpolate(image[None], (60 + j % 7, 90)), path / f"{j}.jpg")

def same_end(a, b):
    """Tensors, their names, optimiser and log of two runs agree bit for bit, but for times and folders."""
    one, two = (torch.load(run / "checkpoint.pt", weights_only=True) for run in (a, b))
    assert [*one["method"]] == [*two["method"]]
    states = [[x for state in saved["optimizer"]["state"].values() for x in state.values()] for saved in (one, two)]
    logs = [[{k: v for k, v in line.items() if "second" not in k and k != "command"} for line in saved["log"]]
            for saved in (one, two)]
    tensors = all(map(torch.equal, one["method"].values(), two["method"].values()))
    return tensors and all(map(torch.equal, *states)) and logs[0] == logs[1]

def unharmed(out, whole):
    """The run's tensors are those of the undisturbed one, and its files are there and whole."""
    json.loads((out / "results.json").read_text())
    names = [{path.name for path in run.iterdir()} for run in (out, whole)]
    leftovers = {name for name in names[0] if re.search(r"\.(\d+|new)$", name)}  # of a kill while writing
    return same_end(out, whole) and names[0] - leftovers == names[1]

# ------------------------------------------------------------------------------------ all scripts

def definitions(script):
    """Source of every top-level function, class and constant of a script."""
    text = Path(script.__file__).read_text()
    sources = {}
    for node in ast.parse(text).body:
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            sources[node.name] = ast.get_source_segment(text, node)
        elif isinstance(node, ast.Assign):
            sources[ast.unparse(node.targets[0]).strip("()")] = ast.get_source_segment(text, node)
    return sources

class OnTheGpu(TorchDispatchMode):
    """Refuses operations on tensors elsewhere: even an index costs a copy that the host awaits."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        tensors = [x for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)]
        assert {x.device.type for x in tensors if x.ndim} <= {"cuda"}, function
        return function(*args, **(kwargs or {}))

def distance(a, b):
    """Of Kolmogorov and Smirnov, between two samples."""
    points = torch.cat([a, b]).unique()
    a, b = (torch.searchsorted(x.sort().values, points, right=True) / len(x) for x in (a, b))
    return (a - b).abs().max()

kinds = lambda net: "".join(type(layer).__name__[0] for layer in net)  # Linear, BatchNorm, ...

# Runs command lines of scripts in forked children. A SIGKILL hits one at a call of a function, or after
# so many seconds; its files cannot grow over a size. Answers with exit code, seconds and output.
ARENA = """
import functools, importlib, json, os, resource, signal, sys
from simclr_essl import draw_patterns
drawn = functools.cache(draw_patterns)
drawn(4000, 1), drawn(1000, 2)  # children find them drawn
for line in sys.stdin:
    script, argv, function, at, size = json.loads(line)
    script, calls = importlib.import_module(script), []
    script.draw_patterns = drawn
    child = os.fork()
    if child == 0:
        for name, stream in (("out", 1), ("err", 2)):
            os.dup2(os.open(sys.argv[1] + name, os.O_CREAT | os.O_TRUNC | os.O_WRONLY), stream)
        if size:
            resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))
        owner = os if function == "replace" else script
        original = getattr(owner, function)
        def dying(*args, **how):
            calls.append(1)
            if len(calls) == at:
                os.kill(os.getpid(), signal.SIGKILL)
            return original(*args, **how)
        setattr(owner, function, dying)
        script.main(argv)
        sys.exit()
    _, status = os.waitpid(child, 0)
    printed = [open(sys.argv[1] + name).read() for name in ("out", "err")]
    print(json.dumps([os.waitstatus_to_exitcode(status), *printed]), flush=True)
"""

@pytest.fixture(scope="module")
def arena(tmp_path_factory):
    """arena(script, out, function, at, size): exit code and output of a run so disturbed."""
    std, pipe = tmp_path_factory.mktemp("arena") / "std", subprocess.PIPE
    alone = os.environ | {"WORLD_SIZE": "", "RANK": ""}  # as good as unset
    process = subprocess.Popen([sys.executable, "-c", ARENA, str(std)], cwd=HERE, env=alone, stdin=pipe,
                               stdout=pipe, text=True)

    def run(script, out, function="learning_rate", at=0, size=0):
        argv = tiny(script, out, "--save-every", "0")
        process.stdin.write(json.dumps([script.__name__, argv, function, at, size]) + "\n")
        process.stdin.flush()
        code, printed, problem = json.loads(process.stdout.readline())
        lines = problem.strip().splitlines()
        assert len(lines) == (code > 0) and all(line.startswith("error: ") for line in lines), problem
        return code, printed

    yield run
    process.stdin.close()
    process.wait()

def write_cifar(root, folder, names, key):
    """Small files of CIFAR's layout."""
    (root / folder).mkdir()
    for name, n in names.items():
        pixels = np.random.default_rng(n).integers(0, 256, (n, 3072), dtype=np.uint8)
        content = {"data": pixels, key: [i % 10 for i in range(n)]}
        (root / folder / name).write_bytes(pickle.dumps(content))
    for meta, classes in (("batches.meta", "label_names"), ("meta", "fine_label_names")):
        (root / folder / meta).write_bytes(pickle.dumps({classes: list("abcdefghij")}))

def gray_wave(n=40):
    y, x = np.mgrid[:n, :n] / n
    return 0.5 + 0.4 * np.sin(9 * x + 5 * y)

def free_port():
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        return str(probe.getsockname()[1])

needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
CUDA = torch.device("cuda")

class DrawsOfTheCpu(TorchDispatchMode):
    """Random numbers come from the CPU, so that a step on the GPU can be compared with one there."""

    @classmethod
    def ignore_compile_internals(cls):
        return True  # else torch.compile compiles nothing under this mode

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs, name = kwargs or {}, function._schema.name
        if name in ("aten::uniform_", "aten::normal_", "aten::random_"):
            return args[0].copy_(function(torch.empty(args[0].shape, dtype=args[0].dtype), *args[1:], **kwargs))
        if name in ("aten::rand", "aten::randn", "aten::randint", "aten::randperm"):
            return function(*args, **kwargs | {"device": CPU}).to(kwargs.get("device") or CPU)
        return function(*args, **kwargs)

FULL_BOX = lambda uniform, height, width, scale: torch.tensor([[0.0, 0, height, width]]).expand(len(uniform(0, 1)), 4)

def stopped(capsys, *argv, script=simclr_essl):
    """The command ends with one line that starts with "error: ", or argparse's; returns the line."""
    with pytest.raises(SystemExit) as stop:
        script.main([str(word) for word in argv])
    if stop.value.code == 2:  # argparse prints its usage before
        return capsys.readouterr().err.strip().splitlines()[-1]
    assert stop.value.code.startswith("error: ") and "\n" not in stop.value.code
    return stop.value.code

def batch_of(script, *flags, n=16):
    """A method, and uint8 images for it."""
    config = script.parse_args(tiny(script, "unused", *flags, "--batch-size", str(n)))
    script.start(config)
    torch.manual_seed(0)
    if script is photonics_reg:
        return script.Method(config), script.draw_cells("gpm", n, 3).float()
    return script.Method(config), script.draw_patterns(n, 3)[0]

def outcome(method, images):
    """(loss, terms) of a method; homomorphic's needs labels."""
    labels = [torch.arange(len(images), device=images.device) % 10] if isinstance(method, homomorphic.Method) else []
    return method(images, *labels)

def normalised(script, x):
    """Images in [0, 1], less the mean of the built-in ones, over their deviation."""
    mean, std = torch.tensor(script.MEAN_STD["patterns"])[..., None, None]
    return (x - mean) / std

def assert_same_step(method, loss, want):
    """Losses and all gradients agree, and every parameter has one."""
    assert loss.item() == pytest.approx(want.item(), rel=1e-5)
    gradients = (torch.autograd.grad(value, list(method.parameters())) for value in (loss, want))
    for a, b in zip(*gradients, strict=True):
        assert torch.allclose(a, b, rtol=1e-3, atol=1e-6) and a.abs().sum() > 0

def interrupted(script, step, line, monkeypatch, capsys):
    """Runs the line, with Ctrl-C at a step, counted from where the run begins or goes on."""
    forward, calls = script.Method.forward, []

    def at_step(*args):
        calls.append(1)
        if len(calls) == step:
            raise KeyboardInterrupt
        return forward(*args)

    with monkeypatch.context() as patch:
        patch.setattr(script.Method, "forward", at_step)
        assert "same command" in stopped(capsys, *line, script=script)

def test_shares_blocks_to_the_letter():
    """What two scripts define is the same text, or has the versions in MAY_DIFFER; and the order is the same."""
    sources, texts = [definitions(script) for script in ALL], {}
    for name, text in itertools.chain(*(definition.items() for definition in sources)):
        texts.setdefault(name, set()).add(text)
    versions = {name: len(different) for name, different in texts.items() if len(different) > 1}
    assert versions == {name: number for name, (number, _) in MAY_DIFFER.items()}
    for one, other in itertools.combinations(sources, 2):
        assert [name for name in one if name in other] == [name for name in other if name in one]

@all_scripts
def test_has_the_paper_first_and_stands_alone(script):
    text = Path(script.__file__).read_text()
    lines = text.splitlines()
    banners = {line.split()[2]: number for number, line in enumerate(lines) if line.startswith("# %%")}
    own = {"care": ["PROTEINS"], "photonics_reg": ["SOLVER"]}.get(script.__name__, [])
    assert [*banners] == ["CONFIG", "METHOD", "AUGMENT", "MODEL", "DATA", *own, "TRAIN", "EVALUATE", "MAIN"]
    assert banners["METHOD"] < len(lines) / 4 and max(map(len, lines)) <= 100
    assert script.SCRIPT == script.__name__ and len(script.__doc__.splitlines()) <= 42
    allowed = {"torch", "torchvision", "numpy", "PIL"} | set(sys.stdlib_module_names)
    for node in ast.walk(ast.parse(text)):
        names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        names += [node.module] if isinstance(node, ast.ImportFrom) else []
        assert {name.split(".")[0] for name in names} <= allowed, names
    for name, definition in vars(script).items():
        if inspect.isfunction(definition) and definition.__module__ == script.__name__:
            assert definition.__doc__, name

# the method

# golden: E-SSL CIFAR-10 code, InfoNCE at temperature 0.5: [loss, |dloss/dz1|, |dloss/dz2|]
INFO_NCE = {
    (8, 5, 0.3, 0.7, 0.35, 0.72): (1.192156737774062, 0.12262782438712605, 0.1014942545528762),
    (16, 32, 1.1, 0.2, 1.0, 0.25): (1.360161967104057, 0.06009900317481963, 0.05983954413634611),
}

def test_info_nce_equals_the_authors():
    for key, want in INFO_NCE.items():
        golden(lambda z1, z2: simclr_essl.info_nce(z1, z2, 0.5), key, want)

def test_every_transformation_against_torchvision():
    x = torch.rand(2, 3, 16, 16)
    versions = {name: f(x).chunk(number) for name, (number, f) in simclr_essl.TRANSFORMS.items()}
    for name, wanted in {
        "vflip": [x, TF.vflip(x)], "hflip": [x, TF.hflip(x)], "grayscale": [x, TF.rgb_to_grayscale(x, 3)],
        "inversion": [x, TF.invert(x)], "rotation": [TF.rotate(x, 90 * k) for k in range(4)],
        "blur": [x] + [TF.gaussian_blur(x, k) for k in (5, 9, 15)],
    }.items():
        for got, want in zip(versions[name], wanted, strict=True):
            assert torch.allclose(got, want, atol=1e-5), name
    quadrants = lambda v: v[0, 0].unfold(0, 8, 8).unfold(1, 8, 8).flatten(2).sum(2).flatten().tolist()
    orders = {tuple(quadrants(v)) for v in versions["jigsaw"]}
    assert len(orders) == 24 and all(sorted(order) == sorted(quadrants(x)) for order in orders)
    assert torch.equal(versions["jigsaw"][0], x)

@of_scripts(IMAGES[:2])
def test_forward_is_algorithm_1(script):
    """The loss of a step, its terms and its gradient, from views drawn alike and sums by hand."""
    method, images = batch_of(script, "--lam", "0.7")
    torch.manual_seed(1)
    loss, terms = method(images)
    assert method.encoder[1].num_batches_tracked == 3  # three passes, each with statistics of its own
    torch.manual_seed(1)
    embed = lambda x, head: head(method.encoder(normalised(script, x)))
    *large, small = (script.augment(images, **how) for how in script.view_arguments(method.config))
    assert [view.shape[2] for view in (*large, small)] == [32, 32, 16]
    z1, z2 = (embed(view, method.projector) for view in large)
    logits = embed(torch.cat([torch.rot90(small, k, (2, 3)) for k in range(4)]), method.predictor)
    rotation = -sum(logits.log_softmax(1)[k * 16 + i, k] for k in range(4) for i in range(16)) / 64
    right = sum(logits[k * 16 + i].argmax().item() == k for k in range(4) for i in range(16))
    if script is simclr_essl:
        invariance = script.info_nce(z1, z2, 0.5)
    else:
        assert method.h[1].num_batches_tracked == 2
        cosines = [F.cosine_similarity(method.h(a), b.detach()) for a, b in ((z1, z2), (z2, z1))]
        invariance = -sum(cosines).mean() / 2
    assert_same_step(method, loss, invariance + 0.7 * rotation)
    assert terms["equivariance"].item() == pytest.approx(rotation.item(), rel=1e-5)
    assert terms["rotation_top1"].item() == pytest.approx(100 * right / 64)
    x = images.float() / 255
    assert torch.equal(method.embed(x), embed(x, method.projector))
    baseline, _ = batch_of(script, "--lam", "0")
    weights = method.state_dict()
    baseline.load_state_dict({name: weights[name] for name in baseline.state_dict()})
    torch.manual_seed(1)
    loss, terms = baseline(images)
    assert baseline.predictor is None and terms.keys() == {"invariance", "std"}
    assert loss.item() == pytest.approx(invariance.item(), rel=1e-5)

# golden: E-SSL CIFAR-10 code, D(p = z1, z = z2)
NEGATIVE_COSINE = {
    (8, 5, 0.3, 0.7, 0.35, 0.72): -0.9735987435868874,
    (16, 32, 1.1, 0.2, 1.0, 0.25): -0.8007049919128958,
}

def test_negative_cosine_equals_the_authors_and_stops_at_z():
    for (n, d, a1, b1, a2, b2), want in NEGATIVE_COSINE.items():
        p, z = wave(n, d, a1, b1).requires_grad_(), wave(n, d, a2, b2).requires_grad_()
        loss = simsiam_essl.negative_cosine(p, z)
        assert loss.item() == pytest.approx(want, rel=1e-9)
        loss.backward()
        u, v = p / p.norm(dim=1, keepdim=True), z / z.norm(dim=1, keepdim=True)
        slope = (v - (u * v).sum(1, keepdim=True) * u) / p.norm(dim=1, keepdim=True)  # d cosine / dp
        assert z.grad is None and torch.allclose(p.grad, -slope / n, atol=1e-12)

def test_simclr_heads_have_the_specified_layers():
    cifar = simclr_essl.Method(simclr_essl.Config())
    assert kinds(cifar.projector) == "LBRLB" and kinds(cifar.predictor) == "LLRLLRL"
    assert cifar.projector[-1].weight is None and cifar.projector[1].weight is not None
    assert cifar.projector[0].bias is None and cifar.predictor[-1].out_features == 4
    assert sum(p.numel() for p in cifar.encoder.parameters()) == 11_168_832  # the authors' net
    imagenet = simclr_essl.Method(simclr_essl.parse_args(["--dataset", "imagenet"]))
    assert kinds(imagenet.projector) == "LBRLBRLB"  # 2048, 2048, 2048, 128 in the code
    assert imagenet.projector[-1].weight is not None and imagenet.projector[-1].num_features == 128
    assert kinds(imagenet.predictor) == "LLRLLRLLL"  # no ReLU after the last LayerNorm
    assert imagenet.predictor[-3].out_features == 128 and imagenet.encoder.layer1[0].bn3.weight.sum() == 0

def test_simsiam_heads_and_presets():
    method = simsiam_essl.Method(simsiam_essl.Config())
    assert kinds(method.projector) == "LBRLB" and method.projector[-1].weight is None
    assert kinds(method.h) == "LBRL" and kinds(method.predictor) == "LLRLLL"
    assert method.h[0].bias is None and [layer.weight.shape for layer in method.h[::3]] == [(512, 2048), (2048, 512)]
    others, h = simsiam_essl.make_optimizer(method, method.config).param_groups
    assert {id(p) for p in h["params"]} == {id(p) for p in method.h.parameters()}
    assert len(others["params"] + h["params"]) == len([*method.parameters()])
    assert (others["weight_decay"], h["weight_decay"], h["lr"]) == (5e-4, 5e-4, 0.12)
    config = simsiam_essl.parse_args(["--dataset", "imagenet"])
    values = config.lam, config.batch_size, config.lr, config.warmup_epochs, config.weight_decay, config.epochs
    assert values == (0.08, 512, 0.05, 0, 1e-4, 100)
    imagenet = simsiam_essl.Method(config)
    assert kinds(imagenet.projector) == "LBRLBRLB" and imagenet.projector[-1].weight is None
    assert kinds(imagenet.predictor) == "LLRLLRLLL" and imagenet.predictor[-3].out_features == 256

@pytest.mark.parametrize("transform", simclr_essl.TRANSFORMS)
def test_figure_1_predicts(transform):
    """Which images the predictor sees, and against which targets; without any other augmentation."""
    method, images = batch_of(simclr_essl, "--transform", transform, "--crop-only")
    number, seen = method.num_versions, []
    for how in (method.large1, method.large2, method.small):
        assert how["size"] == 32 and how["jitter"] is None
        assert how["flip"] == how["gray"] == how["blur"] == how["solarize"] == 0
    method.encoder.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    method.predictor.register_forward_hook(lambda module, x, y: seen.append(y))
    torch.manual_seed(1)
    _, terms = method(images)
    torch.manual_seed(1)
    _, _, v_small = method.views(images)
    shown = v_small[::6] if transform == "jigsaw" else v_small  # 24 versions of 3 of 16
    assert torch.allclose(seen[2] * method.std + method.mean, method.transform(shown), atol=1e-5)
    losses = [F.cross_entropy(part, torch.full((len(shown),), k)) for k, part in enumerate(seen[3].chunk(number))]
    assert terms["equivariance"].item() == pytest.approx(sum(losses).item() / number, rel=1e-5)

@pytest.mark.parametrize("transform", ("jigsaw", "inversion"))
def test_figure_1_augments(transform):
    """Views are crops of versions, drawn for each image apart and equally often."""
    method, images = batch_of(simclr_essl, "--transform", transform, "--role", "augment", "--crop-only")
    number, counts = method.num_versions, torch.zeros(method.num_versions)
    every = method.transform(images / 255).unflatten(0, (number, 16))
    for _ in range(60):
        is_version = (every == method.random_version(images)).flatten(2).all(2)  # (K, 16)
        assert is_version.any(0).all()
        counts += (is_version.float() / is_version.sum(0)).sum(1)  # an image can have equal versions
    counts /= 960 / number
    assert (counts > 0.4).all() and (counts < 1.8).all() and method(images)[1].keys() == {"invariance", "std"}
    torch.manual_seed(2)
    *large, v_small = method.views(images)
    torch.manual_seed(2)
    drawn = [method.random_version(images) for _ in large]  # first, then the crops
    want = [simclr_essl.augment(version, **method.large1) for version in drawn]
    assert all(map(torch.equal, large, want)) and v_small is None

@of_scripts(IMAGES[:2])
def test_views_of_the_paper_and_of_the_code(script):
    arguments = lambda *line: script.view_arguments(script.parse_args([*line]))
    assert arguments() == ({"size": 32}, {"size": 32}, {"size": 16})
    defaults = {name: p.default for name, p in inspect.signature(script.augment).parameters.items()}
    assert defaults["scale"] == (0.2, 1.0) and defaults["jitter"] == (0.4, 0.4, 0.4, 0.1)
    assert (defaults["flip"], defaults["gray"], defaults["blur"], defaults["solarize"]) == (0.5, 0.2, 0, 0)
    large = {"size": 224, "scale": (0.08, 1.0), "jitter": (0.4, 0.4, 0.2, 0.1)}
    other, small = {"blur": 0.1, "solarize": 0.2}, {"size": 96, "scale": (0.05, 0.14), "blur": 0.1}
    for dataset in ("imagenet", "folder"):
        assert arguments("--dataset", dataset) == (large | {"blur": 1.0}, large | other, large | small)
    if script is simclr_essl:
        cropped = arguments("--dataset", "folder", "--crop-only")
        assert [how["scale"] for how in cropped] == [(0.08, 1.0), (0.08, 1.0), (0.05, 0.14)]
        for transform, name in (("hflip", "flip"), ("grayscale", "gray"), ("blur", "blur")):
            large, _, small = arguments("--transform", transform)
            assert small[name] == 0 and name not in large  # the version could not be told from the view

def test_simclr_presets():
    parse = lambda line: simclr_essl.parse_args(line.split())
    config = parse("--dataset imagenet")
    assert config.lr * config.batch_size / 256 == pytest.approx(4.8) and config.final_lr == 0.001
    values = config.lam, config.temperature, config.warmup_epochs, config.weight_decay, config.arch, config.epochs
    assert values == (0.4, 0.2, 10, 1e-6, "resnet50", 100)
    small = simclr_essl.Method(parse("--quick"))
    optimizer = simclr_essl.make_optimizer(small, config)
    assert isinstance(optimizer, simclr_essl.LARS) and optimizer.decay == 1e-6
    optimizer = simclr_essl.make_optimizer(small, parse(""))
    assert type(optimizer) is torch.optim.SGD and optimizer.defaults["lr"] == pytest.approx(0.12)
    [group] = optimizer.param_groups
    assert group["weight_decay"] == 5e-4 and len(group["params"]) == len([*small.parameters()])
    # defaults < preset < --quick < flags
    assert (parse("").dataset, parse("").batch_size, parse("--quick").dataset) == ("cifar10", 512, "patterns")
    both = parse("--quick --dataset cifar10 --epochs 3 --lr 0.03")
    assert (both.dataset, both.arch, both.epochs, both.lr) == ("cifar10", "small", 3, 0.03)
    warmups = {"": 10, "--epochs 40": 10, "--epochs 5": 1, "--epochs 5 --warmup-epochs 3": 3}
    assert {line: parse(line).warmup_epochs for line in warmups} == warmups

def test_spread_is_one_for_uniform_and_zero_for_equal_embeddings():
    assert simclr_essl.spread(torch.randn(2000, 64)).item() == pytest.approx(1, abs=0.02)
    assert simclr_essl.spread(torch.ones(100, 64)).item() == pytest.approx(0, abs=1e-6)

# augmentation

@pytest.mark.parametrize("size", (16, 32, 48))
def test_crop_equals_torchvisions(size):
    x = torch.rand(4, 3, 40, 56)
    boxes = torch.tensor([[0.0, 0, 40, 56], [3, 10, 37, 12], [5, 41, 13, 15], [20, 2, 9, 50]])
    for image, box, got in zip(x, boxes.int().tolist(), simclr_essl.crop(x, boxes, size)):
        assert torch.allclose(got, TF.resized_crop(image, *box, [size, size], antialias=True), atol=1e-5)

def test_operations_equal_torchvisions():
    x, changes, sigmas = torch.rand(4, 3, 32, 32), (-0.4, -0.2, 0.0, 0.4), (0.1, 0.5, 1.0, 2.0)
    x[:, :, :4] = 0.3  # gray has no hue
    for name, theirs, values, *radius in (
        ("brightness", lambda image, change: TF.adjust_brightness(image, 1 + change), changes),
        ("contrast", lambda image, change: TF.adjust_contrast(image, 1 + change), changes),
        ("saturation", lambda image, change: TF.adjust_saturation(image, 1 + change), changes),
        ("shift_hue", TF.adjust_hue, (-0.5, -0.1, 0.0, 0.4)),
        ("gaussian_blur", lambda image, sigma: TF.gaussian_blur(image, 13, sigma), sigmas),
        ("gaussian_blur", lambda image, sigma: TF.gaussian_blur(image, 3, sigma), sigmas, 1),
    ):
        got = getattr(simclr_essl, name)(x, column(*values), *radius)
        for image, value, g in zip(x, values, got):
            assert torch.allclose(g, theirs(image, value), atol=1e-5), name

@cropping
def test_flip_gray_and_solarize_equal_torchvisions(script, monkeypatch):
    monkeypatch.setattr(script, "draw_boxes", FULL_BOX)
    x, off = torch.randint(256, (6, 3, 32, 32), dtype=torch.uint8), {"jitter": None, "flip": 0, "gray": 0}
    for change, want in (({}, x / 255), ({"flip": 1}, TF.hflip(x / 255)),
                         ({"gray": 1}, TF.rgb_to_grayscale(x / 255, 3)),
                         ({"solarize": 1}, TF.solarize(x / 255, 128 / 255))):
        assert torch.allclose(script.augment(x, 32, **off | change), want, atol=1e-6)
        assert torch.allclose(script.augment(x / 255, 32, **off | change), want, atol=1e-6)

@cropping
def test_draws_follow_torchvisions_law(script, monkeypatch):
    """10,000 draws against as many of torchvision's own, and against uniform ones."""
    n, drawn_values, augment = 10_000, {}, script.augment
    names = ("brightness", "contrast", "saturation", "shift_hue")
    for name in ("crop", *names, "gaussian_blur"):
        spy = lambda x, values, *rest, name=name: drawn_values.update({name: values}) or x
        monkeypatch.setattr(script, name, spy)
    x = torch.rand(n, 3, 32, 32)
    augment(x, 32, blur=0.5)
    top, left, height, width = drawn_values["crop"].T
    theirs = [T.RandomResizedCrop.get_params(x[0], [0.2, 1.0], [3 / 4, 4 / 3]) for _ in range(n)]
    wanted = torch.tensor(theirs).float().T
    for got, want in zip((top, left, height, width, height * width), (*wanted, wanted[2] * wanted[3])):
        assert distance(got, want) < 0.0276  # its 0.1 % point
    assert (top + height <= 32).all() and (left + width <= 32).all() and drawn_values["crop"].min() >= 0
    jittered = drawn_values["shift_hue"].flatten() != 0
    assert jittered.float().mean() == pytest.approx(0.8, abs=0.015)
    for name, most in zip(names, (0.4, 0.4, 0.4, 0.1)):
        values = drawn_values[name].flatten()
        assert (values[~jittered] == 0).all()  # no change
        assert distance(values[jittered], torch.linspace(-most, most, n)) < 0.03, name
    assert distance(drawn_values["gaussian_blur"].flatten(), torch.linspace(0.1, 2.0, n)) < 0.0276
    monkeypatch.setattr(script, "gaussian_blur", lambda x, sigma, *radius: 2 - x)
    for name in ("flip", "gray", "solarize", "blur"):
        small = x[:, :, :4, :4]
        changed = augment(small, 4, **{"flip": 0, "jitter": None, "gray": 0} | {name: 0.3}) != small
        assert changed.flatten(1).any(1).float().mean() == pytest.approx(0.3, abs=0.02), name
    calls = []
    for name in names:
        monkeypatch.setattr(script, name, lambda x, values, name=name: calls.append(name) or x)
    for _ in range(300):
        augment(torch.rand(1, 3, 4, 4), 4)
    assert len({tuple(calls[i:i + 4]) for i in range(0, 1200, 4)}) == 24  # every order of the jitter

def test_of_a_photograph_evaluation_sees_the_middle():
    image = torch.rand(1, 3, 384, 300)
    config = simclr_essl.parse_args(["--dataset", "folder"])
    want = TF.resize(TF.center_crop(image, [336, 262]), [224, 224], antialias=True)  # 7/8 of the sides
    assert torch.allclose(simclr_essl.middle(image, config), want, atol=1e-6)

# evaluation

@pytest.mark.parametrize("script, temperature", ((simclr_essl, 0.1), (care, 0.5), (sfrik, 0.07)))
def test_knn_equals_brute_force(script, temperature):
    """All its answers to 400 queries: then other labels of the first 100 leave 75 %."""
    bank, queries, bank_labels = torch.randn(60, 8), torch.randn(400, 8), torch.randint(4, (60,))
    answers = []
    for query in queries:
        s = F.cosine_similarity(query[None], bank).tolist()
        nearest = sorted(range(60), key=lambda i: -s[i])[:7]
        votes = [sum(math.exp(s[i] / temperature) for i in nearest if bank_labels[i] == c) for c in range(4)]
        answers.append(votes.index(max(votes)))
    labels = torch.tensor(answers)
    assert script.knn_accuracy(bank, bank_labels, queries, labels, 7) == 100
    labels[:100] += 1
    assert script.knn_accuracy(bank, bank_labels, queries, labels, 7) == 75

def state(method):
    return {name: value.clone() for name, value in method.state_dict().items()}

def unchanged(method, before):
    return all(torch.equal(before[name], value) for name, value in method.state_dict().items())

@image_scripts
def test_features_are_those_of_eval_mode_and_leave_no_trace(script):
    method, images = batch_of(script)
    outcome(method, images)
    before, many = state(method), script.draw_patterns(300, 4)[0]
    features = script.extract(method, many)
    assert len(features) == 300 and not features.requires_grad and method.training and unchanged(method, before)
    alone = torch.cat([script.extract(method, image[None]) for image in many[:5]])
    assert torch.allclose(features[:5], alone, atol=1e-5)  # no batch statistics
    rows = torch.tensor([7, 3])
    assert torch.allclose(script.extract(method, many, rows=rows), features[rows], atol=1e-5)
    inverted = script.extract(method, many[:9] / 255, lambda x: 1 - x)  # in [0, 1] already
    assert torch.allclose(inverted, script.extract(method, 255 - many[:9]), atol=1e-5)

SGD = functools.partial(torch.optim.SGD, momentum=0.9)
COSINE = [(1 + math.cos(math.pi * step / 4)) / 2 for step in range(4)]
LINEAR_PROBES = [  # settings; the optimiser of a head; its rate in the four steps, as a share of the first
    (simclr_essl, dict(final_lr=0.2), SGD, [0.2 + 0.8 * share for share in COSINE]),
    (simsiam_essl, dict(batch=250), SGD, COSINE),
    (simsiam_essl, dict(batch=250, lars=True), simsiam_essl.LARS, COSINE),
    (care, dict(batch_size=256, milestones=(1,)), torch.optim.Adam, [1, 1, 0.1, 0.1]),
    (care, dict(batch_size=256, milestones=(1,), sgd=True), SGD, [1, 1, 0.1, 0.1]),
    (sfrik, {}, SGD, COSINE),
]

@pytest.mark.parametrize("script, settings, rule, shares", LINEAR_PROBES)
def test_probe_equals_plain_linear_layers(script, settings, rule, shares):
    """Heads at once are as many heads alone: the same starts, orders, rates and steps."""
    features, labels = torch.randn(2, 600, 8), torch.randint(3, (600,))
    test, test_labels = torch.randn(50, 8), torch.randint(3, (50,))
    epochs = iter(features)
    torch.manual_seed(5)
    got = script.linear_probe(lambda: next(epochs), labels, test, test_labels, lr=0.5, weight_decay=0.01, epochs=2,
                              probes=3, **settings)
    torch.manual_seed(5)
    heads, accuracies = [torch.nn.Linear(8, 3) for _ in range(3)], []
    orders = [[torch.randperm(600) for _ in heads] for _ in range(2)]
    for i, head in enumerate(heads):
        optimizer = rule(head.parameters(), 0.5, weight_decay=0.01)
        for step, share in enumerate(shares):  # two in an epoch: the last images are left out
            rows = orders[step // 2][i].split(settings.get("batch", 256))[step % 2]
            optimizer.param_groups[0]["lr"] = 0.5 * share
            optimizer.zero_grad()
            F.cross_entropy(head(features[step // 2][rows]), labels[rows]).backward()
            optimizer.step()
        accuracies.append(100 * (head(test).argmax(1) == test_labels).float().mean().item())
    assert got == pytest.approx((np.mean(accuracies), np.std(accuracies)), abs=1e-4)

def test_probe_of_fewer_images_than_a_batch():
    few = torch.randn(60, 8)
    labels = (few[:, 0] > 0).long()
    assert simclr_essl.linear_probe(lambda: few, labels, few, labels, lr=1.0)[0] > 90

E_SSL = dict(lr=30, final_lr=0, weight_decay=0, epochs=100, probes=5)
CARES = dict(sgd=False, lr=1e-3, weight_decay=1e-6, batch_size=512, epochs=100, milestones=(), probes=3)
AUTHORS_PROBES = [  # defaults; settings of another dataset
    (simclr_essl, E_SSL, "imagenet", dict(lr=0.3, final_lr=1.0, weight_decay=1e-6)),
    (simsiam_essl, E_SSL, "imagenet", dict(lr=1.6, epochs=90, probes=1, batch=4096, lars=True)),
    (care, CARES, "imagenet100", dict(sgd=True, lr=10.0, weight_decay=1e-4, batch_size=128, epochs=60,
                                      milestones=(30, 40, 50))),
]

@pytest.mark.parametrize("script, defaults, dataset, settings", AUTHORS_PROBES)
def test_probe_is_the_authors(script, defaults, dataset, settings, monkeypatch):
    """Fresh crops and flips in every epoch; E-SSL enlarges CIFAR's test images by 9/8 and cuts them."""
    parameters = inspect.signature(script.linear_probe).parameters
    assert {key: parameters[key].default for key in defaults} == defaults
    method, images = batch_of(script)
    method.config.quick, labels, told, seen = False, torch.arange(16) % 3, [], []
    encode = method.features
    monkeypatch.setattr(method, "features", lambda x: seen.append(x) or encode(x))
    monkeypatch.setattr(script, "linear_probe", lambda draw_features, *rest, **settings: (
        told.append(settings) or (draw_features(), draw_features())))
    data = None, (images, labels), (images[:9], labels[:9])
    one, two = script.probe(method, data, method.config, None, torch.zeros(9, 4))
    assert one.shape == two.shape and not torch.equal(one, two)
    if script is not care:
        zoomed = TF.resize(images[:9].float() / 255, [36, 36])
        assert torch.allclose(seen[0], TF.center_crop(zoomed, [32, 32]), atol=1e-6)
    method.config.dataset = dataset
    script.probe(method, data, method.config, None, torch.zeros(9, 4))
    assert told == [{}, settings]

def test_neighbours_are_framed_in_green_and_red(tmp_path):
    images, bank, labels = torch.full((20, 3, 32, 32), 128).byte(), torch.randn(20, 4), torch.arange(20) % 2
    data = None, (images, labels), (images, torch.zeros(20).long())
    simclr_essl.draw_neighbours(tmp_path / "n.png", data, bank, bank)
    picture = TF.pil_to_tensor(datasets.folder.default_loader(tmp_path / "n.png"))
    queries = torch.randperm(20, generator=torch.Generator().manual_seed(0))[:8]
    for i, query in enumerate(queries):  # tiles of 102 pixels, 2 apart
        nearest = F.cosine_similarity(bank[query], bank).topk(8).indices
        corner = picture[:, 3 + 104 * i, 3:3 + 104 * 9:104].T.tolist()
        green, red, gray = [0, 255, 0], [255, 0, 0], [128, 128, 128]
        assert corner == [gray] + [red if labels[j] else green for j in nearest]
    few = images[:3], labels[:3]  # fewer than eight are enough
    simclr_essl.draw_neighbours(tmp_path / "n.png", (None, few, few), bank[:3], bank[:3])

@pytest.mark.parametrize("script, flags, columns", (
    (simclr_essl, "--transform vflip", 5), (care, "--base moco", 5), (care, "--lam 0", 3), (sfrik, "", 3),
    (homomorphic, "--group rotation", 3), (photonics_reg, "", 7), (photonics_reg, "--mode simclr", 3)))
def test_views_png_shows_what_the_method_sees(script, flags, columns, tmp_path, monkeypatch):
    """A row for each image: itself and its views, the small one in all versions; nothing else changes."""
    method, images = batch_of(script, *flags.split())
    before, tiles = state(method), []
    monkeypatch.setattr(script, "frame", lambda image, color: tiles.append(image) or torch.zeros(3, 4, 4))
    torch.manual_seed(4)
    script.draw_views(tmp_path / "v.png", method, images[:4])
    torch.manual_seed(4)
    shown = [images[:4], *(view for view in method.views(images[:4]) if view is not None)]
    if script is simclr_essl:
        shown.append(shown[-1].flip(2))
    if script is photonics_reg:
        shown += script.versions(images[:4], "gpm")[0].chunk(4)
        shown = [(cells[:, None] - 1) / 19 for cells in shown[:columns]]
    want = [column[row] for row in range(4) for column in shown]
    assert len(want) == len(tiles) == 4 * columns and all(map(torch.equal, tiles, want)) and unchanged(method, before)

# a run, its files, its faults

@of_scripts([simclr_essl, care, sfrik, homomorphic])
def test_outputs(script, runs):
    out = runs(script)
    results = json.loads((out / "results.json").read_text())
    own = {"simclr_essl": "rotation_top1", "homomorphic": "classifier_top1", "sfrik": "knn_top1_k10 svm_top1"}
    for name in ("knn_top1 random_init_knn_top1 linear_top1 linear_top1_std random_init_linear_top1 "
                 "train_seconds images_per_second peak_memory_gb " + own.get(script.__name__, "")).split():
        assert results[name] == float(f"{results[name]:.4g}") >= 0, name
    assert all(results[name] for name in "knn_protocol linear_protocol device torch command threads".split())
    assert (results["epochs"], results["seed"]) == (3, 0)
    start, *lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert [line["epoch"] for line in (start, *lines)] == [0, 1, 2, 3]
    config = json.loads((out / "config.json").read_text())
    saved = torch.load(out / "checkpoint.pt", weights_only=True)
    assert config == saved["config"] and (config["device"], config["precision"]) == ("cpu", "fp32")
    assert saved["script"] == script.__name__ and saved["log"] == [start, *lines]
    images = script.draw_patterns(4000, 1)[0][script.random_rows(4000, 128)]
    checksum = zlib.crc32(images[script.random_rows(128, 64)].numpy().tobytes())
    assert saved["data"] == {"number of images": 128, "checksum of 64 images": checksum}
    encoder = torch.load(out / "encoder.pt", weights_only=True)
    assert all(torch.equal(encoder[k], saved["method"][f"encoder.{k}"]) for k in encoder)
    files = "checkpoint.pt config.json encoder.pt metrics.jsonl neighbours.png results.json views.png"
    assert sorted(path.name for path in out.iterdir()) == files.split()

def test_encoder_pt_is_torchvisions():
    """A ResNet's keys are those of torchvision, but for the stem of small images and the classifier."""
    encoder = models.resnet18()
    encoder.conv1, encoder.fc = torch.nn.Conv2d(3, 64, 3, 1, 1, bias=False), torch.nn.Identity()
    assert encoder.state_dict().keys() == simclr_essl.make_encoder("resnet18", 32)[0].state_dict().keys()

def run_training(script, *line):
    """train of a command line."""
    config = script.parse_args([str(word) for word in line])
    device = script.start(config)
    Path(config.out).mkdir(parents=True, exist_ok=True)
    return script.train(config, script.load_data(config, device), device)

@of_scripts([simclr_essl, simsiam_essl, homomorphic])
def test_rate_follows_the_schedule_step_by_step(script, tmp_path, monkeypatch):
    """That of SimSiam's h apart, which is constant. H-SSL's rate is not scaled by the batch."""
    rates = spied_rates(script, monkeypatch)
    run_training(script, *tiny(script, tmp_path / "run", "--final-lr", "0.5"))
    peak = 0.2 if script is homomorphic else 0.2 * 32 / 256
    wave = [math.cos(math.pi * (step - 4) / 8) for step in range(12)]
    want = [peak * (step / 4 if step < 4 else (3 + wave[step]) / 4) for step in range(12)]
    assert [first for first, *_ in rates] == pytest.approx(want)
    assert [h for _, *others in rates for h in others] == pytest.approx([peak] * 12 * (script is simsiam_essl))

def test_learning_rate_and_lars_equal_the_authors():
    """Golden: E-SSL's schedule, 100 epochs of 10 steps, 10 of warm-up; the VICReg/SFRIK optimiser."""
    rate = simclr_essl.learning_rate
    for step, want in {0: 0.0, 5: 0.006, 99: 0.1188, 100: 0.12, 101: 0.11999963445946742,
                       500: 0.07041889066001583, 999: 3.655405325764249e-07}.items():
        assert rate(step, 1000, 100, 0.12) == pytest.approx(want, rel=1e-9)
    assert rate(1000, 1000, 100, 0.12, 0.003) == pytest.approx(0.003)
    assert rate(0, 10, 0, 0.5) == 0.5 and rate(10, 10, 10, 0.5, 0.1) == pytest.approx(0.1)
    p, b = wave(4, 3, 0.3, 0.7).requires_grad_(), wave(1, 3, 0.9, 0.2)[0].requires_grad_()
    optimizer = simclr_essl.LARS([p, b], 0.5, weight_decay=0.01)
    for s in range(3):
        p.grad, b.grad = wave(4, 3, 0.1 * s + 0.2, 0.4), wave(1, 3, 0.6, 0.3 + s)[0]
        optimizer.step()
    want = [0.0, 0.6430967426082691, 0.9833905127546039, 0.29476558491561217, 0.8892215971470072,
            0.9435784967922186, 0.5631997853223364, 0.9949289035137666, 0.6726816178496587,
            0.7813218253666313, 0.9435193270298526, 0.23701276091330567]
    assert p.flatten().tolist() == pytest.approx(want, rel=1e-9, abs=1e-12)
    assert b.tolist() == pytest.approx([0.0, -1.4899934314657473, -0.3685530105552811], rel=1e-9)
    zero = torch.zeros(2, 2, requires_grad=True)  # no ratio: a plain step
    zero.grad = torch.ones(2, 2)
    simclr_essl.LARS([zero], 0.5).step()
    assert (zero == -0.5).all()

@of_scripts([simclr_essl, care, homomorphic])
def test_steps_draw_anew_and_epochs_follow_from_their_number(script, monkeypatch):
    """Each process has its part of the batch, and its own draws, but for CARE; labels stay with their images."""
    config, epochs, rows = script.parse_args(tiny(script, "unused")), [], torch.arange(150)
    for config.seed, epoch, rank in ((0, 1, 0), (0, 2, 0), (3, 1, 0), (0, 1, 1), (0, 1, 0)):
        monkeypatch.setattr(script, "WORLD", 1 + rank)
        monkeypatch.setattr(script, "RANK", rank)
        data = [rows, 7 * rows] if script is homomorphic else [rows]
        steps = []
        for batch in script.batches(*data, config, CPU, epoch):
            if script is homomorphic:
                batch, labels = batch
                assert torch.equal(7 * batch, labels)
            steps.append((batch.tolist(), torch.rand(1).item()))  # what augment would draw
        epochs.append(steps)
    one, *others, second, again = epochs
    assert again == one and [batch[16:] for batch, _ in one] == [batch for batch, _ in second]
    for steps in (one, *others):
        assert len(set(sum((batch for batch, _ in steps), []))) == 4 * 32
    draws = [[draw for _, draw in steps] for steps in (one, second, *others)]
    assert (draws[0] == draws[1]) == (script is care) and len({*sum(draws, [])}) == (12 if script is care else 16)
    assert len({str(steps[0][0]) for steps in (one, *others)}) == 3

KILLS = [  # in a step, before a file is renamed, and while it evaluates; cells: in the second split, and in the first
    (simclr_essl, "learning_rate", 9), (simclr_essl, "replace", 2), (simclr_essl, "knn_accuracy", 2),
    (care, "learning_rate", 9), (homomorphic, "learning_rate", 9), (photonics_reg, "random_views", 18),
    (photonics_reg, "dos_error", 2)]

@pytest.mark.parametrize("script, function, at", KILLS)
def test_killed_run_ends_as_an_uninterrupted_one(script, function, at, arena, runs, tmp_path):
    whole = runs(script)  # computes labels of cells
    assert arena(script, tmp_path / "run", function, at)[0] == -signal.SIGKILL
    code, printed = arena(script, tmp_path / "run")
    assert code == 0 and re.search(r"\b[1-5] of \d epochs done", printed)
    assert unharmed(tmp_path / "run", whole)
    if script is photonics_reg:  # what the fine-tuning of each split starts from
        one, two = (torch.load(x / "checkpoint.pt", weights_only=True)["pretrained"] for x in (whole, tmp_path / "run"))
        assert all(map(torch.equal, one.values(), two.values()))

def test_full_disk(arena, runs, tmp_path):
    """A checkpoint for which there is no room; then there is."""
    whole, out = runs(simclr_essl), tmp_path / "run"
    room = (whole / "checkpoint.pt").stat().st_size * 9 // 10
    assert arena(simclr_essl, out, size=room)[0] == 1 and (out / "views.png").exists()
    assert arena(simclr_essl, out)[0] == 0 and unharmed(out, whole)

@pytest.mark.parametrize("what", ("loss", "weights"))
@pytest.mark.parametrize("script, step", ((simclr_essl, 8), (photonics_reg, 4)))
def test_what_is_not_finite_is_never_saved(script, step, what, tmp_path, monkeypatch, capsys):
    """A loss with a finite gradient, or the reverse, at the second epoch's last step; then Ctrl-C."""
    forward, calls = script.Method.forward, []

    def lost(self, *batch):
        (loss, terms), p = forward(self, *batch), next(self.parameters())
        calls.append(1)
        wrong = math.nan if what == "loss" else (p - p.detach()).abs().sqrt().sum()  # 0, its slope is not
        return loss + wrong if len(calls) == step else loss, terms

    monkeypatch.setattr(script.Method, "forward", lost)
    line = tiny(script, tmp_path / "run", "--save-every", "0")
    message = stopped(capsys, *line, script=script)
    assert "epoch 2" in message and "lr " in message
    saved = torch.load(tmp_path / "run" / "checkpoint.pt", weights_only=True)
    assert saved["log"][-1]["epoch"] == 1
    assert all(value.isfinite().all() for value in saved["method"].values())
    interrupted(script, 1, line, monkeypatch, capsys)

@of_scripts([simclr_essl, photonics_reg])
def test_full_memory_in_one_line(script, tmp_path, monkeypatch, capsys):
    with pytest.raises(RuntimeError) as full:
        torch.empty(10**15)  # of the CPU, for which torch has no error of its own
    line = tiny(script, tmp_path / "run")

    def train(*args):
        raise problem

    monkeypatch.setattr(script, "train", train)
    for problem in (torch.OutOfMemoryError("CUDA out of memory. Tried ..."), full.value):
        assert "batch-size" in stopped(capsys, *line, script=script)
    problem = OSError(28, "No space left on device")
    assert "No space left on device" in stopped(capsys, *line, script=script)
    problem = RuntimeError("size mismatch")
    with pytest.raises(RuntimeError, match="size"):  # other faults are not hidden
        script.main(line)

def test_finished_run_says_so_at_once(runs, tmp_path, monkeypatch, capsys):
    whole, out = runs(simclr_essl), tmp_path / "run"
    shutil.copytree(whole, out)
    read = lambda: json.loads((out / "results.json").read_text())
    times = lambda: {path.name: path.stat().st_mtime_ns for path in out.iterdir()}
    before, results, line = times(), read(), tiny(simclr_essl, out, "--save-every", "9")
    with monkeypatch.context() as patch:
        patch.setattr(simclr_essl, "evaluate", None)
        simclr_essl.main(line)
    printed = capsys.readouterr().out
    assert times() == before and "on cpu, fp32, 1 threads" in printed and "is finished" in printed
    assert re.search(rf"random_init_knn_top1\s+{results['random_init_knn_top1']} %", printed)
    assert re.search(rf"rotation_top1\s+{results['rotation_top1']} %, by chance 25 %", printed)
    (out / "results.json").unlink()
    for name in ("config.json", "encoder.pt", "metrics.jsonl"):  # damaged, which does no harm
        (out / name).write_bytes(b"\xff{")
    thread = threading.Thread(target=simclr_essl.main, args=(line,))  # as in a notebook
    thread.start()
    thread.join()
    assert read() == results and unharmed(out, whole)
    assert torch.load(out / "encoder.pt").keys() == torch.load(whole / "encoder.pt").keys()
    (out / "checkpoint.pt").unlink()  # then its results are of no run
    interrupted(simclr_essl, 9, [*line, "--save-every", "0"], monkeypatch, capsys)
    assert not (out / "results.json").exists()

def test_another_run_in_the_folder_is_refused_and_named(runs, tmp_path, monkeypatch, capsys):
    shutil.copytree(runs(simclr_essl), tmp_path / "run")
    line = tiny(simclr_essl, tmp_path / "run")
    message = stopped(capsys, *line, "--lam", "0")
    assert "another run: lam was 4.0, is 0.0. Choose another --out" in message
    assert "precision was fp32, is bf16" in stopped(capsys, *line, "--precision", "bf16")
    patterns = simclr_essl.draw_patterns
    monkeypatch.setattr(simclr_essl, "draw_patterns", lambda n, seed: patterns(n, seed + 5))
    assert "checksum of 64 images was" in stopped(capsys, *line)

@pytest.mark.parametrize("damage", (
    lambda path: path.write_bytes(path.read_bytes()[:5000]), lambda path: path.write_bytes(b""),
    lambda path: torch.save([1, 2], path), lambda path: torch.save({"script": "x", "config": {}, "data": {}}, path)))
def test_damaged_or_foreign_checkpoint_is_refused(damage, runs, tmp_path, capsys):
    path = tmp_path / "checkpoint.pt"
    shutil.copy(runs(simclr_essl) / "checkpoint.pt", path)
    damage(path)
    message = stopped(capsys, *tiny(simclr_essl, tmp_path))
    assert f"{path} cannot be read" in message or f"{tmp_path} holds another run: script was x" in message

BAD = [
    ("--learning-rate 1", "--learning-rate"), ("--epoch 3", "--epoch"), ("cifar10", "cifar10"),
    ("--dataset cifar11", "patterns"), ("--arch vgg", "small"), ("--epochs many", "many"), ("--epochs", "--epochs"),
    ("--epochs 0", "epochs must be more than 0"), ("--weight-decay -1", "weight-decay must be 0 or more"),
    ("--lr nan", "lr must be"), ("--batch-size 1", "at least 2"), ("--batch-size 320", "more than the 128 images"),
    ("--projector 12-x", "12-x"), ("--projector 0", "not like 0"),
    ("--device tpu", "tpu"), ("--device cuda:77", "cuda:77"),
    ("--out /dev/null", "/dev/null"), ("--out /proc/x", "/proc/x"),
    ("--dataset cifar10 --data-root /dev/null/x", "--quick"),
    ("--dataset cifar10 --data-root /dev/null/x", "x/cifar-10-batches-py is missing"),
    ("--dataset folder --data-root nowhere", "nowhere/train-images.npy"),
    ("--dataset folder --data-root nowhere", "python prepare.py YOUR_IMAGES --out nowhere"),
]

BAD_OF = {
    simclr_essl: [("--small-size 7", "8 or more")],
    simsiam_essl: [("--small-size 7", "8 or more")],
    care: [("--chunks 5", "--chunks 5 must"), ("--chunks 32", "parts of 2"), ("--equivariance-batch 100", "100 must"),
           ("--contrast none", "MoCo has no contrast none"),
           ("--size 7", "8 or more")],
    sfrik: [("--loss rbf", "rbf"), ("--weights 1,x", "1,x"), ("--weights 1,-40", "1,40,40"), ("--lam 0", "lam must be"),
            ("--projector 64-1", "64-1"), ("--size 7", "8 or more")],
    homomorphic: [
        ("--size 28 --arch tiny --group rotation --width 0.06", "--size 28 does not fit --arch tiny"),
        ("--size 16", "--size must be 17"), ("--width 0", "width must be more"), ("--classes 0", "classes must"),
        ("--base-size 0", "base-size must be more"), ("--group rotation --structure none", "--structure none"),
        ("--group scale --base-size 7", "no two different"), ("--group rotation --base-size 4", "no two different"),
        ("--group scale --distance 0.5", "no two different"), ("--distance -1", "distance must be 0 or more"),
        ("--ssl augmented --distance 2", "--ssl homomorphic"), ("--ssl frozen --base-size 2", "--base-size is for"),
        ("--dataset mnist --data-root /dev/null/x", "x/MNIST is missing"), ("--classes 9", "add --classes 10"),
        ("--dataset tinyimagenet --data-root nowhere", "--out nowhere"),
    ],
}

@image_scripts
def test_bad_input_is_one_line(script, tmp_path, capsys):
    for flags, words in BAD + BAD_OF.get(script, []):
        message = stopped(capsys, *tiny(script, tmp_path / "run"), *flags.split(), script=script)
        assert "error: " in message and words in message, (flags, message)
    (tmp_path / "cifar-10-batches-py").mkdir()  # a part of a download, without a network
    line = [*tiny(script, tmp_path / "run"), "--dataset", "cifar10", "--data-root", tmp_path]
    with pytest.MonkeyPatch.context() as patch:
        unreachable = "http://localhost:1/x"
        patch.setattr(datasets.CIFAR10, "download", lambda self: datasets.utils.download_url(unreachable, tmp_path))
        assert "cifar-10-batches-py is damaged" in stopped(capsys, *line, script=script)

@all_scripts
def test_folder_is_named_after_the_flags_given_and_help_names_them(script, capsys):
    name = script.__name__
    for line, want in (("", name), ("--quick", f"{name}-quick=True"), ("--seed 3 --lr 0.030", f"{name}-lr=0.03-seed=3"),
                       ("--lr 3e-2 --seed 3 --device cpu --save-every 1", f"{name}-lr=0.03-seed=3"),
                       ("--dataset folder --data-root x/y/", f"{name}-dataset=folder-y")):
        if "folder" not in line or script in IMAGES:
            assert script.parse_args(line.split()).out == f"runs/{want}"
    config = script.parse_args(["--out=~/x", "--data-root=~/y"])
    assert (config.out, config.data_root) == tuple(os.path.expanduser(path) for path in ("~/x", "~/y"))
    with pytest.raises(SystemExit):
        script.main(["--help"])
    text = capsys.readouterr().out
    assert all(f"--{field.name.replace('_', '-')} " in text for field in fields(script.Config))

def test_progress_is_told_after_ten_seconds_and_then_less_often(monkeypatch, capsys):
    clock = itertools.count(step=4)
    monkeypatch.setattr(simclr_essl.time, "time", lambda: next(clock))
    assert list(simclr_essl.with_progress("abcdefghijkl", 12, "step")) == [*"abcdefghijkl"]
    told = capsys.readouterr().out.splitlines()
    assert told == [" step 2 of 12, 0:01:00 left", " step 6 of 12, 0:00:28 left"]  # after 12 and 28 s
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    list(simclr_essl.with_progress("abcdef", 6, "step"))
    assert capsys.readouterr().out.count("\r") == 4  # a terminal: the same line, from then on always

@of_scripts([simclr_essl, homomorphic, photonics_reg])
def test_compile_changes_neither_names_nor_numbers(script, runs, tmp_path, monkeypatch):
    """With torch's tracer but no compiler behind it: one graph for each network and shape."""
    original, traced = torch.compile, []
    torch._dynamo.reset()  # other scripts' networks are of the same code
    monkeypatch.setattr(torch, "compile", lambda f, **how: traced.append(f.__self__) or original(
        f, backend="eager", fullgraph=True, **how))
    script.main(tiny(script, tmp_path / "run", "--save-every", "0", "--compile"))
    assert len({*map(id, traced)}) == {"simclr_essl": 3, "homomorphic": 3, "photonics_reg": 7}[script.__name__]
    assert same_end(runs(script), tmp_path / "run")

def test_limit_takes_the_first_of_a_shuffled_split():
    def load(*line):
        config = simclr_essl.parse_args(["--dataset", "patterns", "--batch-size", "64", *line])
        return simclr_essl.load_data(config, CPU)

    whole, part, less = load(), load("--limit", "500"), load("--limit", "300", "--seed", "4")
    assert [len(labels) for split in (whole, part) for _, labels in split] == [4000, 4000, 1000, 500, 500, 1000]
    assert torch.equal(part[0][0], part[1][0]) and torch.equal(part[0][0][:300], less[0][0])
    assert not torch.equal(part[0][0], whole[0][0][:500]) and part[0][1].bincount().min() > 30

@of_scripts([simclr_essl, care, sfrik, homomorphic])
def test_files_of_cifar(script, tmp_path, monkeypatch):
    """torchvision's md5 check is replaced."""
    train = {f"data_batch_{i}": 60 for i in range(1, 6)}
    write_cifar(tmp_path, "cifar-10-batches-py", train | {"test_batch": 40}, "labels")
    write_cifar(tmp_path, "cifar-100-python", {"train": 250, "test": 30}, "fine_labels")
    monkeypatch.setattr(datasets.cifar, "check_integrity", lambda path, md5=None: True)
    for dataset, counts, source in (("cifar10", [300, 300, 40], datasets.CIFAR10),
                                    ("cifar100", [250, 250, 30], datasets.CIFAR100)):
        if script is homomorphic and dataset == "cifar100":
            continue
        line = ["--dataset", dataset, "--data-root", str(tmp_path), "--batch-size", "64"]
        data = script.load_data(script.parse_args(line), CPU)
        for (images, labels), n in zip(data, counts):
            assert images.shape == (n, 3, 32, 32) and images.dtype == torch.uint8 and images.is_contiguous()
            assert labels.tolist() == [i % 10 for i in range(n)] and labels.dtype == torch.int64
        assert (data[0][0][7].permute(1, 2, 0).numpy() == source(tmp_path).data[7]).all()

def test_patterns():
    images, labels = simclr_essl.draw_patterns(500, 1)
    assert images.shape == (500, 3, 32, 32) and images.dtype == torch.uint8 and labels.dtype == torch.int64
    assert torch.equal(images, drawn.__wrapped__(500, 1)[0])
    assert not torch.equal(images, simclr_essl.draw_patterns(500, 2)[0]) and labels.bincount(minlength=10).min() > 25
    tint = images.float().mean((2, 3))
    assert ((tint.amax(1) - tint.amin(1)) / tint.mean(1)).max() < 0.05  # nothing to learn from colour

# photographs

PHOTO_FLAGS = ("--arch small --size 48 --small-size 32 --projector 32-32 --predictor 32-32 --batch-size 64 --epochs 2 "
               "--save-every 0 --knn-every 0 --dataset folder --data-root").split()
PHOTO_FLAGS_OF = {
    care: [*"--chunks 4 --arch small --size 48 --projector 32-32".split(), *PHOTO_FLAGS[10:]],
    homomorphic: [*"--width 0.25 --arch small --size 48 --projector 32-32".split(), *PHOTO_FLAGS[10:]],
}

def write_arrays(root, **counts):
    """Arrays as prepare.py writes them: write_arrays(root, train=80, val=9), of two classes."""
    root.mkdir(parents=True, exist_ok=True)
    for seed, (split, n) in enumerate(counts.items()):
        images = simclr_essl.draw_patterns(max(n, 1), seed)[0][:n]
        np.save(root / f"{split}-images.npy", F.interpolate(images, 56).numpy())
        np.save(root / f"{split}-labels.npy", np.arange(n) % 2)
    (root / "classes.json").write_text('["cat", "dog"]')

@of_scripts([simsiam_essl, care, homomorphic])
def test_photographs_from_end_to_end(script, tmp_path, monkeypatch, capsys):
    """Stopped and continued; probed on fresh crops; refused when the arrays are others."""
    root, probe = tmp_path / "photos", script.linear_probe
    write_arrays(root, train=150, val=17)
    monkeypatch.setattr(script, "linear_probe", lambda *args, **how: probe(*args, **how | {"epochs": 1}))
    line = [*PHOTO_FLAGS_OF.get(script, PHOTO_FLAGS), str(root)]
    script.main([*line, "--out", str(tmp_path / "whole")])
    results = json.loads((tmp_path / "whole" / "results.json").read_text())
    assert results["knn_top1"] > 0 and results["linear_top1"] > 0
    part = [*line, "--out", str(tmp_path / "part")]
    interrupted(script, 4, part, monkeypatch, capsys)  # in the second step of the second epoch
    run_training(script, *part)
    assert "1 of 2 epochs done" in capsys.readouterr().out
    assert same_end(tmp_path / "whole", tmp_path / "part")
    (root / "classes.json").write_text('["cat", "cow"]')
    assert "class names was ['cat', 'dog'], is ['cat', 'cow']" in stopped(capsys, *part, script=script)
    write_arrays(root, train=160, val=17)
    assert "number of images was 150, is 160" in stopped(capsys, *part, script=script)
    assert len(script.load_data(script.parse_args([*line, "--limit", "70"]), CPU)[0][0]) == 70

def test_photographs_without_classes_are_not_evaluated(tmp_path, capsys):
    write_arrays(tmp_path, train=70, val=0)
    np.save(tmp_path / "train-labels.npy", np.zeros(70, np.int64))
    simclr_essl.main([*PHOTO_FLAGS, str(tmp_path), "--out", str(tmp_path / "run")])
    assert "no evaluation" in capsys.readouterr().out
    results = json.loads((tmp_path / "run" / "results.json").read_text())
    assert "knn_top1" not in results and (tmp_path / "run" / "encoder.pt").exists()

def test_arrays_of_another_shape_or_type_are_refused(tmp_path, capsys):
    line, good = [*PHOTO_FLAGS, tmp_path, "--out", tmp_path / "run"], simclr_essl.draw_patterns(70, 1)[0].numpy()
    wrong = "train-labels.npy must be 70 classes: integers from 0"
    for images, labels, words in (
        (good / 255, np.arange(70), "train-images.npy must be uint8 (N, 3, H, W), not float64"),
        (good.transpose(0, 2, 3, 1), np.arange(70), "not uint8 (70, 32, 32, 3)"), (good, np.arange(69), wrong),
        (good[0], np.arange(70), "not uint8 (3, 32, 32)"), (good, np.arange(70.0), wrong),
        (good, np.arange(70) - 1, wrong),
    ):
        write_arrays(tmp_path, train=1, val=4)
        np.save(tmp_path / "train-images.npy", images)
        np.save(tmp_path / "train-labels.npy", labels)
        assert words in stopped(capsys, *line)
    write_arrays(tmp_path, train=70, val=4)
    for damage in (b"", b"no array", (tmp_path / "val-images.npy").read_bytes()[:300]):
        (tmp_path / "val-images.npy").write_bytes(damage)
        assert "prepare.py" in stopped(capsys, *line)

def test_photographs_that_exceed_a_gpu_stay_outside(tmp_path, monkeypatch):
    write_arrays(tmp_path, train=80, val=9)
    images, _ = simclr_essl.load_photos(tmp_path, "train")
    room = {"there": 4 * images.nbytes}
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (room["there"], 0))
    moved = []
    monkeypatch.setattr(torch.Tensor, "to", lambda self, device: moved.append(self.nbytes) or self)
    simclr_essl.place((images, torch.arange(80)), torch.device("cuda"))
    assert moved == [640]  # the labels alone
    room["there"] += 4
    simclr_essl.place((images, torch.arange(80)), torch.device("cuda"))
    assert moved == [640, images.nbytes, 640]

# prepare.py

def prepared(*argv, code=None):
    """What prepare.py ends with, by a command line."""
    try:
        return prepare.main([str(word) for word in argv])
    except SystemExit as stop:
        return stop.code

def pixels(path, size=40):
    return prepare.read_picture(path, size).transpose(1, 2, 0).astype(int)

@pytest.mark.parametrize("kind", ("png 16", "tiff 16", "tiff 16 big", "tiff 32", "tiff float", "holes"))
def test_prepare_reads_gray_values_of_more_than_8_bits(kind, tmp_path):
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
    got = pixels(path)
    assert got.shape == (40, 40, 3) and abs(got - want[..., None]).max() <= 1

def test_prepare_reads_pictures_as_a_viewer_shows_them(tmp_path, capsys):
    """All eight turns of EXIF; transparency over white; palettes, gray, CMYK; broken metadata."""
    colors = (gray_wave()[..., None] * [200, 120, 250]).astype(np.uint8)
    upright = Image.fromarray(colors)
    undo = {2: 0, 3: 3, 4: 1, 5: 5, 6: 2, 7: 6, 8: 4}  # Image.Transpose that stores it with the tag
    for tag in range(1, 9):
        exif = Image.Exif()
        exif[0x0112] = tag
        stored = upright.transpose(Image.Transpose(undo[tag])) if tag > 1 else upright
        stored.save(tmp_path / "x.png", exif=exif)
        assert (pixels(tmp_path / "x.png") == colors).all(), tag
        stored.convert("L").save(tmp_path / "x.tif", exif=exif)  # which PIL may map into memory
        assert (pixels(tmp_path / "x.tif")[..., 0] == np.asarray(upright.convert("L"))).all(), tag
    see_through = upright.convert("RGBA")
    see_through.putalpha(Image.fromarray(np.repeat([[0, 255]], 20, 1).repeat(40, 0).astype(np.uint8)))
    see_through.save(tmp_path / "x.png")
    over_white = colors.copy()
    over_white[:, :20] = 255
    assert (pixels(tmp_path / "x.png") == over_white).all()
    for image in (upright.convert("L"), upright.quantize(), upright.convert("1"), upright.convert("LA")):
        image.save(tmp_path / "x.png")
        assert (pixels(tmp_path / "x.png") == np.asarray(image.convert("RGB"))).all(), image.mode
    upright.convert("CMYK").save(tmp_path / "x.jpg")
    assert abs(pixels(tmp_path / "x.jpg") - colors).mean() < 20
    text, raw = PngImagePlugin.PngInfo(), PngImagePlugin.PngInfo()
    text.add_text("parameters", "a" * (2 << 20), zip=True)
    raw.add_text("Raw profile type exif", "\nexif\n      10\n" + "zz" * 10 + "\n")
    capsys.readouterr()
    large, junk = b"a" * (2 << 20), b"Exif\0\0junkjunk"
    for how in (dict(pnginfo=text), dict(icc_profile=large), dict(pnginfo=raw), dict(exif=junk)):
        upright.save(tmp_path / "x.png", **how)
        assert (pixels(tmp_path / "x.png") == colors).all(), how.keys()
        told = capsys.readouterr().out
        assert ("EXIF is broken" in told) == ("exif" in how or how.get("pnginfo") is raw)
    # turned, and an artist that is a number: upright, though the tags cannot be changed
    tags = struct.pack("<4sIHHHIIHHIfI", b"II*\0", 8, 2, 0x0112, 3, 1, 6, 0x013B, 11, 1, 1.5, 0)
    upright.transpose(Image.Transpose.ROTATE_90).save(tmp_path / "x.png", exif=b"Exif\0\0" + tags)
    assert (pixels(tmp_path / "x.png") == colors).all()

def test_prepare_cuts_the_middle_square_and_resizes_it(tmp_path):
    picture = F.interpolate(simclr_essl.draw_patterns(1, 5)[0].float(), (300, 500), mode="bicubic").clamp(0, 255)[0]
    TF.to_pil_image(picture.byte()).save(tmp_path / "x.png")
    want = TF.resize(TF.center_crop(picture.byte(), [300, 300]), [64, 64], antialias=True)
    assert abs(pixels(tmp_path / "x.png", 64) - want.permute(1, 2, 0).numpy().astype(int)).max() <= 2
    TF.to_pil_image(picture.byte()).resize((4000, 2400)).save(tmp_path / "x.jpg", quality=95)  # decoded at a fraction
    assert abs(pixels(tmp_path / "x.jpg", 64) - want.permute(1, 2, 0).numpy().astype(int)).mean() < 3
    Image.new("L", (65000, 2), 77).save(tmp_path / "strip.png")
    assert (pixels(tmp_path / "strip.png", 224) == 77).all()  # not by way of 224 x 7,280,000 pixels

def test_prepare_counts_what_is_there(tmp_path, capsys):
    """What Pillow opens, each real folder once, nothing that systems leave; the rest is counted."""
    picture, train = Image.fromarray(np.zeros((9, 9, 3), np.uint8)), tmp_path / "train"
    names = "cat/a.jpeg cat/b.JPG cat/c.gif dog/d.webp dog/e.avif dog/f.tif dog/deep/g.png loose.png ../elsewhere/h.png"
    others = ("cat/._a.jpg cat/.ipynb_checkpoints/a.jpg __MACOSX/cat/a.jpg .trash/a.jpg cat/.DS_Store @eaDir/x.jpg "
              "cat/@eaDir/a.jpg/x.jpg #recycle/a.jpg $RECYCLE.BIN/a.jpg cat/notes.txt dog/film.mpg dog/paper.pdf "
              "dog/scan.fits dog/list dog/more dog/cloud.pcd loose.txt")
    for name in names.split() + others.split():
        (train / name).parent.mkdir(parents=True, exist_ok=True)
        if name in names:
            picture.save(train / name)
        else:
            (train / name).write_text("no picture")
    (train / "cat" / "c.gif").rename(train / "cat" / "c.jfif")  # its content counts
    for link, target in (("dog/deep/up", ".."), ("dog/again", "."), ("cat/a", "../../train"), ("cat/b", "../dog"),
                         ("cat/link", "../../elsewhere")):
        (train / link).symlink_to(target)
    assert prepared(tmp_path, "--out", tmp_path / "out", "--size", 8) is None
    printed = capsys.readouterr().out
    assert f"{train}: 8 images, 2 classes\n" in printed
    assert "ignored 7 other files: no extension 2, " in printed and ".txt 1" in printed and ".pcd 1" in printed
    assert "left out 2 files beside the class folders: .png 1, .txt 1" in printed
    assert np.load(tmp_path / "out" / "train-labels.npy").tolist() == [0] * 4 + [1] * 4
    assert json.loads((tmp_path / "out" / "classes.json").read_text()) == ["cat", "dog"]
    assert np.load(tmp_path / "out" / "val-images.npy").shape == (0, 3, 8, 8)

def test_prepare_knows_classes_by_name(tmp_path):
    """Lists, some of each class, val/ that lacks a class, names in NFC and NFD; what does not fit."""
    out, names = tmp_path / "out", tmp_path / "list"
    cafe = {form: unicodedata.normalize(form, "café") for form in ("NFC", "NFD")}
    image_tree(tmp_path, **{f"train__{cafe['NFC']}": 3, "train__hot dog": 5, "train__rare": 4,
                            f"val__{cafe['NFD']}": 2, "val__hot dog": 1})
    (tmp_path / "val" / "rare").mkdir()
    names.write_bytes("\ufeffhot dog\r\n\n café \n".encode())
    assert prepared(tmp_path, "--out", out, "--size", 8, "--classes", names, "--per-class", 4) is None
    assert json.loads((out / "classes.json").read_text()) == [cafe["NFC"], "hot dog"]
    labels = [np.load(out / f"{split}-labels.npy").tolist() for split in ("train", "val")]
    assert labels == [[0] * 3 + [1] * 4, [0, 0, 1]]
    for content, words in ((b"hot dog\ncow", "cow"), ("café".encode("latin-1"), "utf-8")):
        names.write_bytes(content)
        assert words in prepared(tmp_path, "--out", tmp_path.parent / "x", "--classes", names)
    image_tree(tmp_path, val__cow=1)
    assert "not in these: cow" in prepared(tmp_path, "--out", tmp_path.parent / "x")
    (tmp_path / "train" / "phone").mkdir()
    (tmp_path / "train" / "phone" / "IMG_1.HEIC").write_bytes(b"heic")
    message = prepared(tmp_path, "--out", tmp_path / "x")
    assert "train/phone has no image" in message and ".heic 1" in message and "convert to JPEG first" in message
    for path, words in (("nowhere", "there is no folder"), ("val", "val/train is missing")):
        assert words in prepared(tmp_path / path, "--out", tmp_path / "x")
    assert prepared(tmp_path, "--out", tmp_path / "x", "--size", 0) == 2 and not (tmp_path / "x").exists()

def test_prepare_names_all_damaged_files_or_leaves_them_out(tmp_path, capsys):
    image_tree(tmp_path, train__cat=6, train__dog=5, val__cat=3)
    damaged = [tmp_path / name for name in ("train/cat/1.jpg", "train/dog/0.jpg", "val/cat/2.jpg")]
    damaged[0].write_bytes(b"no header")
    damaged[1].write_bytes(damaged[1].read_bytes()[:400])
    damaged[2].unlink()
    damaged[2].symlink_to("/mnt/annex/2.jpg")
    Image.new("1", (15000, 13000)).save(tmp_path / "val" / "cat" / "bomb.png")
    line = [tmp_path, "--out", tmp_path / "out", "--size", 8]
    message = prepared(*line)
    assert message.startswith("error: 4 files") and all(str(path) in message for path in damaged)
    assert "bomb.png" in message and "pixels" in message and "--skip-damaged" in message
    assert not (tmp_path / "out").exists()
    assert prepared(*line, "--skip-damaged") is None and "left out 4 files" in capsys.readouterr().out
    images, labels = simclr_essl.load_photos(tmp_path / "out", "train")  # as the scripts read them
    assert images.shape == (9, 3, 8, 8) and labels.tolist() == [0] * 5 + [1] * 4
    kept = [path for path in sorted((tmp_path / "train").glob("*/*.jpg")) if path not in damaged]
    assert all((image.numpy() == prepare.read_picture(path, 8)).all() for image, path in zip(images, kept, strict=True))
    assert [len(part) for part in simclr_essl.load_photos(tmp_path / "out", "val")] == [2, 2]

def test_prepare_decodes_once_and_a_killed_decoding_is_taken_up(tmp_path, monkeypatch, capsys):
    tree, out = tmp_path / "tree", tmp_path / "deep" / "out"
    image_tree(tree, train__cat=5, train__dog=4)
    line = [tree, "--out", out, "--size", 8]
    read, header, calls = prepare.read_picture, prepare.write_header, []

    def killed(file, n, size):
        if calls:
            raise KeyboardInterrupt
        header(file, n, size)

    monkeypatch.setattr(prepare, "read_picture", lambda *args: calls.append(args) or read(*args))
    with monkeypatch.context() as patch:
        patch.setattr(prepare, "write_header", killed)  # when the pictures are written, the labels not
        assert "the same command" in prepared(*line)
    assert not out.exists() and out.with_name("out.part").exists()  # no script takes it for whole
    assert prepared(*line) is None and len(np.load(out / "train-images.npy")) == 9
    assert [path.name for path in out.parent.iterdir()] == ["out"]
    before = len(calls)
    assert prepared(*line) is None and len(calls) == before and "already" in capsys.readouterr().out
    assert "not empty" in prepared(*line[:-1], 9)  # another size
    image_tree(tree, train__cow=1)
    assert "not empty" in prepared(*line)
    somebodys = tmp_path / "own.part" / "x"
    somebodys.parent.mkdir()
    somebodys.write_text("")
    assert "in the way" in prepared(tree, "--out", tmp_path / "own") and somebodys.exists()
    assert "among the images" in prepared(tree, "--out", tree / "train" / "out")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(9, 9, 1919))
    assert "too little room" in prepared(tree, "--out", tmp_path / "new", "--size", 8)

# several processes, and other ways to start

def test_world_size_left_over_in_the_environment(tmp_path):
    """Alone: one line. With the rest: it says for whom it waits, and Ctrl-C works. Empty: see arena."""
    line = [sys.executable, "simclr_essl.py", *tiny(simclr_essl, tmp_path / "run")]
    alone = subprocess.run(line, cwd=HERE, env=os.environ | {"WORLD_SIZE": "2"}, capture_output=True, text=True)
    assert alone.stderr.startswith("error: WORLD_SIZE is 2") and alone.returncode == 1
    there = dict(WORLD_SIZE="2", RANK="0", MASTER_ADDR="localhost", MASTER_PORT=free_port())
    waits = subprocess.Popen(line, cwd=HERE, env=os.environ | there, stdout=subprocess.PIPE, text=True)
    assert waits.stdout.readline() == "waiting for 2 processes\n"
    time.sleep(1)
    waits.send_signal(signal.SIGINT)
    assert waits.wait(20) == -signal.SIGINT

NOTEBOOK = """
import io, runpy, sys

class OutStream(io.TextIOBase):  # as ipykernel's: no reconfigure, no encoding
    def write(self, text):
        return sys.__stdout__.write(text)
    def isatty(self):
        return False

sys.stdout, sys.argv = OutStream(), sys.argv[1:]
runpy.run_path("simclr_essl.py", run_name="__main__")
"""

def test_runs_in_a_notebook(tmp_path):
    """By %run; and as the last cell of a notebook, where the arguments are the kernel's: --quick."""
    def started(*argv):
        line = [sys.executable, "-c", NOTEBOOK, *argv]
        left_over = os.environ | {"LOCAL_RANK": "1", "RANK": "1", "PYTHONUNBUFFERED": "1"}
        return subprocess.Popen(line, cwd=tmp_path, env=left_over, stdout=subprocess.PIPE, text=True)

    (tmp_path / "simclr_essl.py").symlink_to(HERE / "simclr_essl.py")
    magic_run = started("simclr_essl.py", *tiny(simclr_essl, tmp_path / "run"))
    last_cell = started("/x/ipykernel_launcher.py", "-f", "kernel-1.json")
    assert "is finished" in magic_run.communicate()[0]
    while (line := last_cell.stdout.readline()) and "0 of 12 epochs done" not in line:
        pass
    last_cell.kill()
    assert line and (tmp_path / "runs").is_dir()
    last_cell.communicate()

TWO = """
import importlib, json, os, sys, torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel
if "RANK" in os.environ:
    dist.init_process_group("gloo")
results = []
for name, flags in json.loads(sys.argv[2]):
    script = importlib.import_module(name)
    config = script.parse_args(["--dataset", "patterns", "--batch-size", "32", *flags.split()])
    torch.manual_seed(0)
    method = script.Method(config).eval()  # running statistics: the processes share no batch
    images, labels = script.draw_patterns(100, 1)
    data = [images, labels] if name == "homomorphic" else [images]
    batch = next(script.batches(*data, config, torch.device("cpu"), 1))
    if name == "homomorphic":  # given fibers and views
        rows = 7 * torch.arange(len(batch[0])) + int(os.environ.get("RANK", 0)) * 7 * 16
        method.draw_fibers = lambda n: method.pairs[rows % len(method.pairs)].unbind(1)
        method.views = lambda images: (images / 255, images.flip(3) / 255)
    elif name != "care":  # given views; care's processes draw what one draws
        method.views = lambda images: (images / 255, images.flip(3) / 255, images[:, :, ::2, ::2] / 255)
    if name == "sfrik":
        method.views = lambda images: (images / 255, images.flip(3) / 255)
    if "--equivariance-batch 16" in flags:
        method.views = lambda images: (images / 255, images.flip(3) / 255, images[::2] / 255, images[::2] / 512)
    model = DistributedDataParallel(method) if dist.is_initialized() else method
    loss, terms = model(*batch) if name == "homomorphic" else model(batch)
    loss.backward()
    terms.pop("std", None)  # of the first process
    terms.pop("mmd", None)
    terms.pop("rotation_top1", None)  # a few images on the edge may change sides
    if dist.is_initialized():
        for term in terms.values():
            dist.all_reduce(term)
            term /= 2
    results.append([terms, [p.grad for p in method.parameters() if p.requires_grad]])
if os.environ.get("RANK", "0") == "0":
    torch.save(results, sys.argv[1])
if dist.is_initialized():
    dist.barrier()  # a process that leaves early can take the other down with it
    dist.destroy_process_group()
"""

def test_two_processes_compute_what_one_computes(tmp_path):
    together = [("simclr_essl", ""), ("simclr_essl", "--lam 0"), ("simsiam_essl", ""), ("care", "--chunks 4"),
                ("care", "--chunks 1 --lam 1"), ("care", "--share-pair --lam 1"), ("care", "--base moco --queue 100"),
                ("care", "--chunks 4 --equivariance-batch 16"), ("homomorphic", "--group rotation --width 0.25"),
                ("homomorphic", "--ssl augmented --width 0.25"), ("homomorphic", "--ssl frozen --width 0.25"),
                ("sfrik", "--projector 64-64")]
    together += [("sfrik", f"--projector 64-64 --loss {loss}") for loss in ("simclr", "auh", "vicreg")]

    def launch(name, **env):
        line = [sys.executable, "-c", TWO, str(tmp_path / name), json.dumps(together)]
        return subprocess.Popen(line, cwd=HERE, env=os.environ | env, stderr=subprocess.PIPE)

    there = dict(WORLD_SIZE="2", MASTER_ADDR="127.0.0.1", MASTER_PORT=free_port())
    processes = [launch("two", RANK=str(rank), **there) for rank in range(2)] + [launch("one")]
    for process in processes:
        assert process.wait(300) == 0, process.stderr.read().decode()
    one, two = torch.load(tmp_path / "one"), torch.load(tmp_path / "two")
    for of, (terms, gradients), (others, theirs) in zip(together, one, two, strict=True):
        for name in terms:
            assert others[name].item() == pytest.approx(terms[name].item(), rel=1e-5, abs=1e-8), (of, name)
        for a, b in zip(gradients, theirs, strict=True):
            assert torch.allclose(a, b, rtol=1e-3, atol=1e-6), of

def torchrun(script, out):
    """A run of two processes that saves after every epoch."""
    line = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", f"--master-port={free_port()}"]
    line += [f"{script.__name__}.py", *tiny(script, out, "--save-every", "0")]
    return subprocess.Popen(line, cwd=HERE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)

def ended_well(run, out):
    """The first process alone has printed and written."""
    printed, problem = run.communicate(timeout=300)
    assert run.returncode == 0, problem
    assert printed.count("waiting for 2 processes") == printed.count("epoch 3/3") == 1
    assert json.loads((out / "results.json").read_text())["processes"] == 2

@of_scripts([care, homomorphic])
def test_run_of_two_processes(script, tmp_path):
    ended_well(torchrun(script, tmp_path / "run"), tmp_path / "run")

def test_lost_process(tmp_path):
    """One of two is killed: the other ends, too; the same command ends as an undisturbed run."""
    whole, out = tmp_path / "whole", tmp_path / "lost"
    run = torchrun(simclr_essl, out)
    while not (out / "checkpoint.pt").exists():
        assert run.poll() is None, run.stderr.read()
        time.sleep(0.01)
    both = [int(pid) for pid in Path(f"/proc/{run.pid}/task/{run.pid}/children").read_text().split()]
    os.kill(both[-1], signal.SIGKILL)
    _, problem = run.communicate(timeout=120)
    assert run.returncode == 1 and not any(Path(f"/proc/{pid}").exists() for pid in both), problem
    undisturbed, again = torchrun(simclr_essl, whole), torchrun(simclr_essl, out)
    ended_well(undisturbed, whole)
    _, problem = again.communicate(timeout=300)
    assert again.returncode == 0 and unharmed(out, whole), problem

# a GPU: on any machine by tensors without numbers, and a real one

STEPS = [(simclr_essl, f"--dataset patterns {flags}", 32) for flags in (
    "", "--lam 0", "--transform jigsaw", "--transform hflip --crop-only", "--transform grayscale",
    "--transform inversion", "--transform blur", "--role augment --transform vflip")]
STEPS += [(simsiam_essl, f"--dataset patterns {flags}", 32) for flags in ("", "--lam 0")]
STEPS += [(care, f"--dataset patterns --batch-size 8 --chunks 2 {flags}", 32) for flags in (
    "", "--lam 0", "--base moco --queue 16", "--share-pair --equivariance-batch 4", "--contrast uniformity",
    "--contrast invariance", "--contrast none")]
STEPS += [(sfrik, f"--dataset patterns --projector 64-4 {flags}", 32) for flags in (
    "", "--loss simclr", "--loss auh", "--loss vicreg")]
STEPS.append((sfrik, "--dataset imagenet20 --arch small --size 32 --projector 64-8", 48))
STEPS += [(script, "--dataset folder --arch small --size 32 --small-size 16", 48) for script in IMAGES[:2]]
STEPS.append((care, "--dataset folder --arch small --size 32 --batch-size 8 --chunks 2", 48))
STEPS.append((care, "--dataset chains --batch-size 8 --chunks 2", 0))
STEPS += [(photonics_reg, f"--arch small --dataset {kind} --mode {mode}", 32)
                for kind in ("gpm", "blob") for mode in photonics_reg.MODES]
STEPS += [(homomorphic, f"--dataset patterns --width 0.25 --group {group} --ssl {ssl}", 32)
                for group in ("translation", "rotation", "scale") for ssl in ("homomorphic", "augmented")]
STEPS += [(homomorphic, f"--width 0.25 {flags}", side) for flags, side in (
    ("--ssl supervised", 28), ("--ssl frozen --structure none", 28), ("--group scale --structure none", 28),
    ("--dataset folder --group scale --size 32", 48))]

@pytest.mark.parametrize("script, flags, side", STEPS, ids=[f"{x.__name__} {flags}" for x, flags, _ in STEPS])
def test_step_on_a_gpu_mixes_no_devices_and_never_waits(script, flags, side, tmp_path, monkeypatch):
    """On torch's tensors without numbers, which can be "on a GPU" on any machine.

    They refuse to mix devices, and to give the host a number. They cannot go backward. bf16 is for
    the backbone only.
    """
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda *how: True)
    monkeypatch.setattr(torch.cuda.amp.common, "amp_definitely_not_available", lambda: False)
    monkeypatch.setattr(torch, "randperm", np.random.permutation)  # an order drawn on the CPU
    config = script.parse_args([*flags.split(), "--precision", "bf16", "--out", str(tmp_path)])
    method, seen, entered, labels = script.Method(config), {}, set(), []
    if "--mode supervised" in flags:
        method = script.Method(config, 1)
    for name, network in method.named_children():
        network.register_forward_pre_hook(lambda module, x: entered.add(x[0].dtype))
        last = [*network.modules()][-1]
        last.register_forward_hook(lambda module, x, y, name=name: seen.update({name: y.dtype}))
    with FakeTensorMode():
        for module in method.modules():
            for tensors in (module._parameters, module._buffers):
                for name, x in tensors.items():
                    there = x if x is None else torch.empty(x.shape, dtype=x.dtype, device="cuda")
                    tensors[name] = torch.nn.Parameter(there) if isinstance(x, torch.nn.Parameter) else there
        if script is photonics_reg:
            images = torch.empty(8, 32, 32, device="cuda")
            labels = [torch.empty(8, 400, device="cuda")]
        elif side == 0:
            images = torch.empty(8, 50, 4, device="cuda")  # clouds
        else:
            images = torch.empty(8, len(method.mean), side, side, dtype=torch.uint8, device="cuda")
        with OnTheGpu():
            loss, terms = method(images, *labels) if labels else outcome(method, images)
    assert {x.device.type for x in (loss, *terms.values())} == {"cuda"}
    narrow = {name for name, dtype in seen.items() if dtype == torch.bfloat16}
    if script is sfrik:  # the wide projector is in bf16, too, and gets float32 from the encoder
        assert narrow == {"encoder", "projector"}
    else:
        assert narrow == {"encoder", "key_encoder"} & seen.keys() >= {"encoder"}
    assert {loss.dtype, *entered} == {torch.float32}

def step_on(device, script, *flags, compiled=False):
    """(loss, gradients) of a step with flags, on a device, by draws of the CPU."""
    method, images = batch_of(script, *flags, n=64)
    method.to(device)
    for network in method.children() if compiled else ():
        network.forward = torch.compile(network.forward, dynamic=False)
    torch.manual_seed(1)
    with DrawsOfTheCpu():
        loss, _ = outcome(method, images.to(device))
    loss.backward()
    return loss.item(), [p.grad.cpu() for p in method.parameters() if p.grad is not None]

@needs_cuda
@all_scripts
def test_cuda_step_equals_the_cpus(script):
    """In float32, to rounding; in bf16, and compiled, nearly."""
    before = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
    torch.set_float32_matmul_precision("highest")
    torch.backends.cudnn.allow_tf32 = False
    try:
        ours, theirs = (step_on(device, script, "--precision", "fp32") for device in (CUDA, CPU))
        compiled = step_on(CUDA, script, "--precision", "fp32", compiled=True)
    finally:
        torch.set_float32_matmul_precision(before[0])
        torch.backends.cudnn.allow_tf32 = before[1]
    assert ours[0] == pytest.approx(theirs[0], rel=1e-4)
    largest = max(gradient.norm() for gradient in theirs[1])
    for a, b in zip(ours[1], theirs[1], strict=True):  # of biases before BatchNorm only rounding is left
        assert (a - b).norm() <= 1e-2 * b.norm() + 1e-4 * largest
    assert compiled[0] == pytest.approx(ours[0], rel=1e-2)
    loss, gradients = step_on(CUDA, script, "--precision", "bf16")
    assert loss == pytest.approx(theirs[0], rel=0.03, abs=0.03)
    assert all(gradient.isfinite().all() for gradient in gradients)

@needs_cuda
@all_scripts
def test_cuda_step_never_synchronises(script):
    method, images = batch_of(script, "--precision", "bf16", n=64)
    method.to(CUDA, memory_format=torch.channels_last)
    optimizer = script.make_optimizer(method, method.config)
    images = images.to(CUDA)
    for mode in ("default", "error"):  # the first step may
        torch.cuda.set_sync_debug_mode(mode)
        try:
            loss, terms = outcome(method, images)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        finally:
            torch.cuda.set_sync_debug_mode("default")
    assert loss.isfinite()

@needs_cuda
@all_scripts
def test_cuda_run_is_saved_continued_and_read_on_the_cpu(script, tmp_path, monkeypatch, capsys):
    line = tiny(script, tmp_path / "run", "--save-every", "0", "--device", "cuda")
    interrupted(script, 7, line, monkeypatch, capsys)
    script.main(line)
    assert re.search(r"[1-3] of \d epochs done", capsys.readouterr().out)
    results = json.loads((tmp_path / "run" / "results.json").read_text())
    assert results["peak_memory_gb"] > 0 and results["device"] == torch.cuda.get_device_name()
    encoder = torch.load(tmp_path / "run" / "encoder.pt", weights_only=True)
    assert {value.device.type for value in encoder.values()} == {"cpu"}
    method, _ = batch_of(script)
    method.encoder.load_state_dict(encoder)
    assert all(value.isfinite().all() for value in encoder.values())

# ------------------------------------------------------------------------------------------- care

# golden: CARE code, InfoNCE at temperature 0.5 (0) and L_equi of 1, 2, 4 chunks
CARE = {
    (8, 5, 0.3, 0.7, 0.35, 0.72): {
        0: (1.717286490101503, 0.15148178634031298, 0.11516476761010855),
        1: (0.13006332211262422, 0.6994578654940891, 0.6758810840689089),
        2: (0.01933762356234623, 0.21212251405593197, 0.22029342265322938),
        4: (0.001887174234987087, 0.030033280236594243, 0.03366621899957973)},
    (16, 32, 1.1, 0.2, 1.0, 0.25): {
        0: (1.9036428962240337, 0.06614670810175684, 0.06588266932345674),
        1: (0.060553464399842244, 0.08446995961998817, 0.08477384025005363),
        2: (0.03251465274522154, 0.061784355343207274, 0.06248180653302952),
        4: (0.015290326684648855, 0.04137087552665543, 0.041639830827585815)},
}

def test_care_losses_equal_the_authors():
    for key, wanted in CARE.items():
        for chunks, want in wanted.items():
            loss = lambda a, b: care.equivariance_loss(a, b, chunks) if chunks else care.nt_xent(a, b, 0.5)
            golden(loss, key, want)

def orthogonal(d):
    return torch.linalg.qr(torch.randn(d, d, dtype=torch.float64))[0]

def test_equivariance_loss_of_rotated_embeddings_is_zero():
    z = torch.randn(12, 5, dtype=torch.float64)
    turned = torch.cat([part @ orthogonal(5) for part in z.chunk(3)])  # another for each chunk
    assert care.equivariance_loss(z, turned, 3).item() == pytest.approx(0, abs=1e-25)
    assert care.equivariance_loss(z, turned, 1) > 0.01

care_method = lambda *flags, n=16: batch_of(care, *"--base simclr --projector 512-128".split(), *flags, n=n)

def test_care_is_algorithm_1():
    """The loss of a step, its terms and its gradient, from views drawn alike and sums by hand."""
    method, images = care_method("--lam", "0.3")
    torch.manual_seed(1)
    loss, terms = method(images)
    assert method.encoder[1].num_batches_tracked == 4  # four forward passes
    torch.manual_seed(1)
    how = dict(size=32, scale=(0.08, 1.0), blur=0.5, radius=1)
    views = [care.augment(images, **how, alike=alike) for alike in (1, 1, 4, 4)]
    z = [method.projector(method.encoder(normalised(care, view))) for view in views]
    equivariance = care.equivariance_loss(z[2], z[3], 4)
    assert_same_step(method, loss, care.nt_xent(z[0], z[1], 0.5) + 0.3 * equivariance)
    assert terms["equivariance"].item() == pytest.approx(equivariance.item(), rel=1e-5)

def test_what_care_draws(monkeypatch):
    """How many images share an augmentation, of which images, under every flag; and of clouds."""
    drawn, draw = [], care.augment
    spy = lambda x, size, alike=1, **how: drawn.append((x, alike)) or draw(x, size, alike=alike, **how)
    monkeypatch.setattr(care, "augment", spy)
    for flags, of_pairs in (([], [(16, 4)] * 2), (["--share-pair"], [(16, 16)] * 2),
                            (["--equivariance-batch", "8"], [(8, 2)] * 2), (["--lam", "0"], [])):
        drawn.clear()
        method, images = care_method(*flags)
        _, terms = method(images)
        assert [(len(x), share) for x, share in drawn] == [(16, 1), (16, 1), *of_pairs], flags
        assert all(torch.equal(x, images[:len(x)]) for x, _ in drawn)
        assert ("equivariance" in terms) == (len(of_pairs) > 0)
    same, cloud = images[:1].expand(16, -1, -1, -1), torch.rand(1, 9, 4)
    turned = care.rotate_randomly(cloud.expand(16, -1, -1), 4)
    for x in draw(same, 32, blur=0.5, solarize=0.5, alike=4), turned:
        alike = (x[:, None] == x[None]).flatten(2).all(2)
        assert torch.equal(alike, torch.arange(16)[:, None] // 4 == torch.arange(16) // 4)
    assert (turned[..., 3] == cloud[..., 3]).all() and not torch.allclose(turned, cloud)
    config = care.parse_args(["--dataset", "chains", "--batch-size", "16", "--chunks", "4"])
    clouds, rotations, drawn = care.load_data(config, CPU)[0][0][:16], care.haar_rotations, []
    monkeypatch.setattr(care, "haar_rotations", lambda n, device: drawn.append(n) or rotations(n, device))
    care.Method(config)(clouds)
    assert drawn == [16, 16, 4, 4]

@pytest.mark.parametrize("share", (1, 2, 3, 8, 16))
def test_processes_draw_alike_and_take_their_part(share, monkeypatch):
    """Whatever the number of processes: also where two have a part of one chunk."""
    images, clouds = care.draw_patterns(16, 0)[0], torch.rand(16, 9, 4)
    draws = (lambda part: care.augment(images[part], 24, blur=0.5, alike=share),
             lambda part: care.rotate_randomly(clouds[part], share))
    for draw in draws:
        torch.manual_seed(3)
        whole, parts = draw(slice(None)), []
        for rank in range(4):
            with monkeypatch.context() as patch:
                patch.setattr(care, "WORLD", 4)
                patch.setattr(care, "RANK", rank)
                torch.manual_seed(3)
                parts.append(draw(slice(4 * rank, 4 * rank + 4)))
        assert torch.allclose(torch.cat(parts), whole, atol=1e-6)

def test_ablations_of_care():
    z1, z2 = torch.randn(2, 6, 3, dtype=torch.float64)
    z1, z2 = F.normalize(z1), F.normalize(z2)
    want = sum((a - b).norm() for a, b in zip(z1, z2)) / 6
    assert care.invariance_loss(3 * z1, z2).item() == pytest.approx(want.item(), rel=1e-12)
    rows = torch.cat([z1, z2])
    want = math.log(sum(math.exp(a @ b) for a in rows for b in rows) / 144)
    assert care.uniformity_loss(z1, 2 * z2).item() == pytest.approx(want, rel=1e-12)
    method, images = care_method("--contrast", "none", "--lam", "2")
    loss, terms = method(images)
    assert loss.item() == pytest.approx(2 * terms["equivariance"].item()) and terms["contrast"] == 0
    for name, loss in (("uniformity", care.uniformity_loss), ("invariance", care.invariance_loss)):
        assert care_method("--contrast", name)[0].contrastive_loss(z1, z2) == loss(z1, z2)

def test_moco(monkeypatch):
    """Keys, queue and momentum; the equivariance branch and views.png leave queue and keys alone."""
    method, images = care_method("--base", "moco", "--queue", "64", "--lam", "1")
    q, k, queue = torch.randn(5, 4), torch.randn(5, 4), F.normalize(torch.randn(7, 4))
    s = torch.cat([F.cosine_similarity(q, k)[:, None], F.normalize(q) @ queue.T], 1) / 0.2
    want = -s.log_softmax(1)[:, 0].mean()
    assert care.moco_loss(q, k, queue, 0.2).item() == pytest.approx(want.item(), rel=1e-5)
    before, keys, embed_keys = method.queue.clone(), [], method.embed_keys
    monkeypatch.setattr(method, "embed_keys", lambda x: keys.append(embed_keys(x)) or keys[-1])
    with torch.no_grad():
        for p in method.encoder.parameters():
            p.add_(1)
    old = [p.clone() for p in method.key_encoder.parameters()]
    method.views(images)
    assert torch.equal(method.queue, before)
    method(images)[0].backward()
    assert torch.equal(method.queue[:48], before[16:])  # the oldest have left
    assert torch.allclose(method.queue[48:], F.normalize(keys[0])) and not keys[0].requires_grad
    for p, was, target in zip(method.key_encoder.parameters(), old, method.encoder.parameters()):
        assert torch.allclose(p, 0.99 * was + 0.01 * target, atol=1e-6) and p.grad is None
    assert [part[1].num_batches_tracked.item() for part in (method.encoder, method.key_encoder)] == [3, 1]
    trained = {id(p) for group in care.make_optimizer(method, method.config).param_groups for p in group["params"]}
    assert trained == {id(p) for part in (method.encoder, method.projector) for p in part.parameters()}

def test_cares_presets():
    parse = lambda line="": care.parse_args(line.split())
    names = ("lam", "chunks", "optimizer", "lr", "final_lr", "weight_decay", "temperature")
    for line, *want in (
        ("", 0.01, 16, "adam", 1e-3, 1.0, 1e-6, 0.5), ("--dataset cifar100", 0.001, 4, "adam", 1e-3, 1.0, 1e-6, 0.5),
        ("--dataset stl10", 0.01, 8, "sgd", 0.06, 0.0, 5e-4, 0.5),
        ("--dataset imagenet100", 0.005, 16, "sgd", 0.8, 0.0, 1e-4, 0.2),
        ("--base moco", 0.01, 16, "sgd", 0.03, 0.0, 5e-4, 0.1),
        ("--base moco --dataset stl10", 0.01, 8, "sgd", 0.06, 0.0, 5e-4, 0.1),
        ("--base moco --dataset imagenet100", 0.005, 16, "sgd", 0.8, 0.0, 1e-4, 0.2),
    ):
        assert [getattr(parse(line), name) for name in names] == want, line
    c, cifar = parse("--dataset imagenet100"), parse()
    assert (c.epochs, c.batch_size, c.equivariance_batch, c.size, c.queue) == (200, 512, 128, 224, 65536)
    assert (cifar.arch, cifar.epochs, cifar.batch_size, cifar.projector) == ("resnet50", 400, 256, "512-128")
    assert (parse("--dataset stl10").warmup_epochs, parse("--base moco").queue) == (10, 4096)
    assert cifar.equivariance_batch == 256 and parse("--batch-size 64").equivariance_batch == 64
    assert care.view_arguments(c) == dict(size=224, scale=(0.2, 1.0), blur=0.5, radius=2)
    assert kinds(care.Method(parse("--quick")).projector) == "LBRL"
    assert kinds(care.Method(parse("--dataset folder --arch small --projector 64-16")).projector) == "LRL"
    branch = care.Method(c).encoder.layer1[0].bn3  # authors' code: residual branches do not start at zero
    assert branch.weight.sum() == len(branch.weight)

@of_scripts([care, sfrik])
def test_stl10(script, tmp_path, monkeypatch):
    """CARE also trains on images with labels; SFRIK is evaluated at 96 pixels. torchvision's md5 check is replaced."""
    folder = tmp_path / "stl10_binary"
    folder.mkdir()
    for name, n in (("unlabeled", 90), ("train", 40), ("test", 20)):
        pixels = np.random.default_rng(n).integers(0, 256, (n, 3, 96, 96), dtype=np.uint8)
        (folder / f"{name}_X.bin").write_bytes(pixels.tobytes())
        (folder / f"{name}_y.bin").write_bytes(np.uint8(np.arange(n) % 10 + 1).tobytes())
    (folder / "class_names.txt").write_text("\n".join("abcdefghij"))
    (folder / "fold_indices.txt").write_text("0\n")
    monkeypatch.setattr(datasets.STL10, "_check_integrity", lambda self: True)
    config = script.parse_args(["--dataset", "stl10", "--data-root", str(tmp_path), "--batch-size", "32"])
    train, bank, test = script.load_data(config, CPU)
    numbers = [130, 40, 20] if script is care else [90, 40, 20]
    assert [images.shape for images, _ in (train, bank, test)] == [(n, 3, 96, 96) for n in numbers]
    assert (train[1] == -1).sum() == 90 and bank[1].tolist() == [i % 10 for i in range(40)]
    config.limit = 35
    assert [len(labels) for _, labels in script.load_data(config, CPU)] == [35, 40 if script is care else 35, 20]
    x = bank[0][:3] / 255
    want = TF.resize(x, [32, 32], antialias=True) if script is care else x
    assert torch.equal(script.middle(x, config), want)

def test_haar_rotations_and_the_principal_axis():
    turns = care.haar_rotations(20_000, CPU)
    assert torch.allclose(turns @ turns.mT, torch.eye(3).expand_as(turns), atol=1e-5)
    assert torch.allclose(torch.det(turns), torch.ones(20_000), atol=1e-4)
    trace = turns.diagonal(dim1=1, dim2=2).sum(1)
    assert trace.mean().abs() < 0.03 and (trace**2).mean().item() == pytest.approx(1, abs=0.04)
    assert turns.mean(0).abs().max() < 0.02
    cloud = torch.tensor([[-1.0, 0, 0, 1], [-1, 0.2, 0, 1], [-1, 0, 0.1, 1], [3, -0.2, -0.1, 1]])
    axis = care.principal_axis(cloud[None])[0]
    assert axis[0] > 0.99 and axis.norm() == pytest.approx(1, rel=1e-6)
    assert care.principal_axis(-cloud[None])[0, 0] < -0.99
    encode = care.DeepSets()
    padded = torch.cat([cloud, torch.zeros(3, 4)])[torch.randperm(7)]  # order and padding do not matter
    assert torch.allclose(encode(cloud[None]), encode(padded[None]), atol=1e-6)
    assert not torch.allclose(encode(cloud[None]), encode(2 * cloud[None]))

ATOM = "ATOM  {:5d}  CA  GLY A{:4d}    {:8.3f}{:8.3f}{:8.3f}  1.00  0.00"

def test_protein_files(tmp_path, capsys):
    root = tmp_path / "proteins"
    root.mkdir()
    line = f"--dataset proteins --data-root {tmp_path} --out {tmp_path}/run --batch-size 2 --chunks 1".split()
    assert "no .pdb files" in stopped(capsys, *line, script=care)
    for i in range(30):
        steps = torch.randn(19 if i == 5 else 20 + i, 3).cumsum(0).tolist()
        kind = "PDB" if i == 3 else "pdb"
        (root / f"p{i:02d}.{kind}").write_text("\n".join(ATOM.format(j, j, *xyz) for j, xyz in enumerate(steps)))
    config = care.parse_args(line)
    train, bank, test = care.load_data(config, CPU)
    assert (len(train[1]), bank, len(test[1])) == (26, None, 3)  # one is too short
    assert "26 proteins to train on, 3 to test; left out: 1 of fewer than 20 residues" in capsys.readouterr().out
    assert train[0].shape[1] == 49 and test[0][0, :, 3].sum() == 29  # p09: the tenth
    points = train[0][0][train[0][0, :, 3] > 0, :3]
    assert points.mean(0).abs().max() < 1e-5 and points.square().sum(1).mean().item() == pytest.approx(1, rel=1e-5)

    def loaded(names, tests="p29"):
        """Numbers of atoms of what two lists of names load."""
        (root / "train.txt").write_text(names)
        (root / "val.txt").write_text(tests, encoding="utf-8")
        train, _, test = care.load_data(config, CPU)
        return [cloud[:, 3].sum().item() for cloud in (*train[0], *test[0])]

    assert loaded("p01.pdb\n\np02\n p03.PDB\r\n", "\ufeffp29\n") == [21, 22, 23, 49]
    for folder, source in (("a", "p11"), ("b", "p12")):  # files of one name are apart
        (root / folder).mkdir()
        shutil.copy(root / f"{source}.pdb", root / folder / "1abc.A.pdb")
    shutil.copy(root / "p11.pdb", root / "a" / "only.pdb")
    (root / "empty.pdb").write_text("")
    assert loaded("a/1abc.A\nb/1abc.A\n") == [31, 32, 49] and loaded("only\np01") == [31, 21, 49]
    assert loaded("empty\np01\np02") == [21, 22, 49] and "1 without CA atoms" in capsys.readouterr().out
    for names, tests, words in (("p01", "p05", "too few"), ("p01", "p77", "the first is p77"),
                                ("1abc.A\np01", "p29", "the first is 1abc.A")):
        with pytest.raises(SystemExit, match=words):
            loaded(names, tests)

def test_lines_of_protein_files(tmp_path):
    path, first = tmp_path / "x.pdb", ATOM.format(1, 1, 1.5, -2.25, 3.0)
    other = first.replace(" 1.500", " 4.000")
    selenium, both = other.replace("ATOM  ", "HETATM").replace("GLY", "MSE"), [[1.5, -2.25, 3.0], [4.0, -2.25, 3.0]]
    for lines, want in (([first, other], both), ([first, selenium], both), ([], []),
                        ([first, other.replace("CA  ", "CA A")], both), (["ATOM", "ATOM      1  CA"[:14]], [])):
        path.write_text("\n".join(lines))
        assert care.read_protein(path).tolist() == want
    for lines in ([first, selenium.replace("MSE", "CA ")], [first, "ENDMDL", other],
                  [first, other.replace(" CA ", " CB "), other.replace("CA  GLY", "CA BGLY")]):
        path.write_text("\n".join(lines))
        assert care.read_protein(path).tolist() == both[:1]  # one atom alone
    path.write_text("\n".join([first, first]))
    with pytest.raises(SystemExit, match="x.pdb has all its atoms in one place"):
        care.read_protein(path)
    for bad in (first[:30] + 24 * "*", first[:36], first.replace("   1.500", "     nan")):
        path.write_text("\n".join([other, bad]))
        with pytest.raises(SystemExit, match="error: .*x.pdb has no finite coordinates in the line 'ATOM"):
            care.read_protein(path)

def test_the_axis_probes_tell_what_an_embedding_knows(monkeypatch):
    method = care.Method(care.parse_args(["--dataset", "chains"]))
    data = care.load_data(care.parse_args(["--dataset", "chains", "--limit", "500"]), CPU)

    def measured(embed):
        monkeypatch.setattr(method, "embed", embed)
        results = care.axis_probes(method, data)
        return [results[name] for name in ("axis_angle_degrees", "ridge_axis_angle_degrees", "ridge_axis_mse")]

    angle, ridge, mse = measured(lambda x: 3 * care.principal_axis(x))
    assert angle < 6 and ridge < 0.1 and mse < 1e-4
    sign = lambda x: torch.randint(2, (len(x), 1)) * 2 - 1
    angle, ridge, mse = measured(lambda x: sign(x) * care.principal_axis(x))
    assert 75 < angle < 105 and 75 < ridge < 105 and mse == pytest.approx(1, abs=0.05)

# ------------------------------------------------------------------------------------------ sfrik

# golden: SFRIK's code, [loss, |dloss/dz1|, |dloss/dz2|] of two pairs of waves
SFRIK = {
    "sfrik L=3": (lambda a, b: sfrik.sfrik_loss(a, b, a.shape[1] / 4000, (1, 40, 40)),
                  (62.16760081, 79.23587012, 79.38914667), (54.52702587, 9.268830717, 9.252951397)),
    "sfrik L=2": (lambda a, b: sfrik.sfrik_loss(a, b, a.shape[1] / 4000, (1, 40)),
                  (52.50968718, 79.03729242, 79.77217541), (52.57507878, 9.266053039, 9.240061913)),
    "vicreg": (lambda a, b: sfrik.vicreg_loss(a, b, 10, 10, 1),
               (4.524743145, 0.8360672494, 0.6912275662), (5.921771430, 0.3815566971, 0.3783212184)),
    "auh": (lambda a, b: sfrik.auh_loss(a, b, a.shape[1] / 3000, 2.5),
            (29.75807678, 59.25586892, 59.64061004), (32.29701228, 6.950002529, 6.938032909)),
    "simclr": (lambda a, b: sfrik.nt_xent(a, b, 0.15),
               (1.053758979, 0.3573980766, 0.3103226399), (0.1603186429, 0.05338357747, 0.05329532594)),
}

def test_sfriks_losses_equal_the_authors():
    pairs = (8, 5, 0.3, 0.7, 0.35, 0.72), (16, 32, 1.1, 0.2, 1.0, 0.25)
    for function, *wanted in SFRIK.values():
        for pair, want in zip(pairs, wanted):
            golden(function, pair, want)

def test_legendre_polynomials():
    t = torch.linspace(-1, 1, 50, dtype=torch.float64)
    for q in (3, 8, 64):  # Gegenbauer's, of index q / 2 - 1, by their own recurrence, over those of 1
        gegenbauer = [torch.ones_like(t), (q - 2) * t]
        for l in range(2, 7):
            a, b = gegenbauer[-1], gegenbauer[-2]
            gegenbauer.append(((2 * l + q - 4) * t * a - (l + q - 4) * b) / l)
        for degree, want in enumerate(gegenbauer[1:], start=1):
            assert torch.allclose(sfrik.legendre(degree, q, t), want / want[-1], atol=1e-11)
    got = sfrik.legendre(4, 8192, torch.tensor(0.3).double())
    assert got.item() == pytest.approx(0.008040044344, rel=1e-6)  # golden: SFRIK's code

def test_mean_kernel():
    """Its slow loop, and its value on a collapsed batch."""
    weights = (1, 40, 40)
    for n, q in ((6, 4), (5, 16), (40, 3)):
        z, slow = torch.randn(n, q, dtype=torch.float64), 0
        for u, v in itertools.product(F.normalize(z), repeat=2):
            t = u @ v
            p2, p3 = (q * t**2 - 1) / (q - 1), ((q + 2) * t**3 - 3 * t) / (q - 1)
            slow += (t + 40 * p2 + 40 * p3).item() / n**2
        assert sfrik.mean_kernel(F.normalize(z), weights).item() == pytest.approx(slow, rel=1e-12) and slow > 0
    assert sfrik.mean_kernel(F.normalize(torch.ones(9, 5)), weights).item() == pytest.approx(81)

@pytest.mark.parametrize("name, function", (
    ("sfrik", lambda z1, z2: sfrik.sfrik_loss(z1, z2, 32 / 7, (1, 30))),
    ("vicreg", lambda z1, z2: sfrik.vicreg_loss(z1, z2, 7, 8, 3)),
    ("auh", lambda z1, z2: sfrik.auh_loss(z1, z2, 32 / 7, 1.5)),
    ("simclr", lambda z1, z2: sfrik.nt_xent(z1, z2, 0.2))))
def test_sfrik_is_its_algorithm(name, function):
    flags = ("--lam 4.571428571428571 --sim-coeff 7 --weights 1,30,0 --std-coeff 8 --cov-coeff 3 --auh-scale 1.5 "
             "--temperature 0.2")
    method, images = batch_of(sfrik, "--loss", name, *flags.split())
    torch.manual_seed(1)
    loss, terms = method(images)
    assert method.encoder[1].num_batches_tracked == 2  # two passes, each with statistics of its own
    torch.manual_seed(1)
    embed = lambda x: method.projector(method.encoder(normalised(sfrik, x)))
    z1, z2 = (embed(sfrik.augment(images, **how)) for how in sfrik.view_arguments(method.config))
    assert loss.item() == pytest.approx(function(z1, z2).item(), rel=1e-5)
    distance = (F.normalize(z1) - F.normalize(z2)).norm(dim=1).square().mean()
    assert terms["distance"].item() == pytest.approx(distance.item(), rel=1e-5)
    off = sfrik.mean_kernel(F.normalize(z1), (1, 30)).item() * 16 / 15 - 31 / 15  # without i = j
    assert terms["mmd"].item() == pytest.approx(off, rel=1e-4)
    loss.backward()
    assert all(p.grad.abs().sum() > 0 for n, p in method.named_parameters() if "weight" in n)
    assert torch.equal(method.embed(images / 255), embed(images / 255))

def test_sfriks_presets():
    parse = lambda line: sfrik.parse_args(line.split())
    names = "arch epochs batch_size size lr lam projector weights std_coeff cov_coeff".split()
    for line, want in (
        ("imagenet20", "resnet18 100 2048 224 1.2 2.048 8192-8192-8192 1,40,40 10.0 1.0"),
        ("imagenet", "resnet50 200 2048 224 0.4 0.8192 8192-8192-32768 1,40,40 10.0 1.0")):
        assert " ".join(str(getattr(parse(f"--dataset {line}"), name)) for name in names) == want
    # defaults < of the baseline < of the dataset < flags
    rates = {"--loss simclr": 0.8, "--loss auh": 1.0, "--loss vicreg": 0.7, "--loss auh --lr 0.3": 0.3,
             "--dataset imagenet --loss vicreg": 0.4}
    assert {line: parse(line).lr for line in rates} == rates
    assert parse("--loss auh").lam == 8192 / 3000 and parse("--loss vicreg").sim_coeff == 10
    c = parse("--dataset imagenet20 --arch small --projector 32-32")
    optimizer = sfrik.make_optimizer(sfrik.Method(c), c)
    assert isinstance(optimizer, sfrik.LARS) and optimizer.decay == 1e-6 and c.warmup_epochs == 10
    assert optimizer.defaults["lr"] == pytest.approx(9.6) and c.final_lr == 0.001
    [group] = sfrik.make_optimizer(sfrik.Method(c), parse("--quick --lr 0.1")).param_groups
    assert (group["lr"], group["momentum"], group["weight_decay"]) == (0.1, 0.9, 5e-4)

def test_sfriks_views_heads_and_stems():
    views = lambda line: sfrik.view_arguments(sfrik.parse_args(line.split()))
    for dataset in ("imagenet20", "imagenet", "folder"):
        large = {"size": 224, "scale": (0.08, 1.0), "jitter": (0.4, 0.4, 0.2, 0.1), "blur": 1.0}
        assert views(f"--dataset {dataset}") == (large, large | {"blur": 0.1, "solarize": 0.2})
    small = {"size": 32, "jitter": (0.4, 0.4, 0.2, 0.1)}
    assert views("") == (small, small | {"solarize": 0.2})
    assert views("--dataset stl10") == 2 * ({"size": 64, "scale": (0.08, 1.0), "jitter": (0.4,) * 4, "jitter_p": 1.0},)
    method = sfrik.Method(sfrik.parse_args("--dataset stl10 --projector 8-6-4".split()))
    assert kinds(method.projector) == "LBRLBRL" and method.encoder.conv1.kernel_size == (7, 7)  # ImageNet's stem
    assert method.projector[0].bias is not None and method.projector[-1].bias is None
    assert sfrik.Method(sfrik.parse_args(["--projector", "8-8"])).encoder.conv1.kernel_size == (3, 3)

def test_jitter_for_every_image():
    """jitter_p, which sfrik alone has: 1 changes the hue of all images, 0 that of none."""
    x = sfrik.draw_patterns(50, 1)[0]
    for share in (1.0, 0.0):
        torch.manual_seed(1)
        got = sfrik.augment(x, 32, flip=0, gray=0, jitter=(0.4, 0.4, 0.4, 0.4), jitter_p=share)
        torch.manual_seed(1)
        plain = sfrik.augment(x, 32, flip=0, gray=0, jitter=None)
        assert ((got - plain).abs().flatten(1).amax(1) > 0.01).float().mean() == share

def test_the_svm_solves_its_problem():
    """Against plain gradient descent; by its gradient where that takes too long."""
    solve = sfrik.linear_svm
    for n, d, cost, steps in ((40, 5, 0.7, 5000), (20, 60, 300.0, 0), (600, 20, 300.0, 0)):
        x, labels = F.normalize(torch.rand(n, d, dtype=torch.float64)), torch.arange(n) % 3
        w, y = solve(x, labels, cost), 2.0 * F.one_hot(labels) - 1
        slope = lambda w: w - 2 * cost * x.T @ (y * F.relu(1 - y * (x @ w)))
        v = torch.zeros_like(w) if steps else w
        for _ in range(steps):
            v = v - 0.01 * slope(v)
        assert torch.allclose(w, v, atol=1e-4) and slope(w).abs().max() < 1e-6 * cost * n

def test_the_svms_cost_is_chosen_by_cross_validation(monkeypatch):
    """Features are normalised, and a fold is told by what the other two have taught."""
    solve, labels, seen = sfrik.linear_svm, torch.arange(90) % 3, []
    train = torch.randn(90, 20) + 2 * F.one_hot(labels, 20)  # by the rows it learned from: cost 30
    monkeypatch.setattr(sfrik, "linear_svm", lambda x, *rest: seen.append(x) or solve(x, *rest))
    accuracy, cost = sfrik.svm_accuracy(train, labels, train[:30] + 0.1, labels[:30])
    assert accuracy > 90 and cost in (0.1, 0.3, 0.5)
    assert [len(x) for x in seen] == [60] * 27 + [90] and (seen[0][:, -1] == 1).all()
    assert torch.allclose(seen[0][:, :-1].norm(dim=1), torch.ones(60).double())
    near = [set((x[:, :-1] @ F.normalize(train).double().T).argmax(1).tolist()) for x in seen[:3]]
    assert set.intersection(*near) == set() and set.union(*near) == set(range(90))

def test_sfriks_probe_sees_a_percentage_of_each_class_in_fresh_crops(monkeypatch):
    defaults = inspect.signature(sfrik.linear_probe).parameters
    settings = dict(lr=0.4, weight_decay=1e-6, epochs=100, probes=3)
    assert {key: defaults[key].default for key in settings} == settings
    method, images = batch_of(sfrik, n=260)
    labels = torch.arange(260) % 13 // 3 % 4
    monkeypatch.setattr(sfrik, "linear_probe", lambda draw, *rest: (draw(), draw(), *rest))
    data, bank = (None, (images, labels), (None, "labels")), torch.arange(260)[:, None]
    for percent, counts in ((1, [1, 1, 1, 1]), (10, [8, 6, 6, 6]), (100, [80, 60, 60, 60])):
        first, _, got, test, test_labels = sfrik.probe(method, data, method.config, bank, "test", percent)
        rows = first[:, 0]  # --quick: the features of the bank
        assert got.bincount().tolist() == counts and (test, test_labels) == ("test", "labels")
        assert torch.equal(labels[rows], got) and len(rows.unique()) == len(rows)
        assert percent < 10 or rows.tolist() != sorted(rows.tolist())  # drawn, not the first of the file
    method.config.quick = False
    first, second, *_ = sfrik.probe(method, data, method.config, bank, "test", 10)
    assert len(first) == 26 and not torch.allclose(first, second)

def test_held_out_images_are_never_trained_on():
    load = lambda *line: sfrik.load_data(sfrik.parse_args(["--dataset", "patterns", "--validate", *line]), CPU)
    images, labels = sfrik.draw_patterns(4000, 1)
    (train, y), bank, (test, held) = load()
    assert held.bincount().tolist() == (labels.bincount() // 10).tolist() and bank[0] is train
    sums = [x.flatten(1).sum(1).sort().values for x in (torch.cat([train, test]), images)]
    assert torch.equal(*sums)
    few, _, other = load("--limit", "700")
    assert torch.equal(other[0], test) and len(few[1]) == 700
    # imagenet20: 260 images of a class, in the order of the files, and all others
    mixed = torch.randperm(1800) % 3
    parts = sfrik.split_rows(mixed, sfrik.parse_args(["--dataset", "imagenet20"]))
    for part, start, stop in zip(parts, (0, 260), (260, 600)):
        rows = [[i for i in range(1800) if mixed[i] == c][start:stop] for c in range(3)]
        assert part.tolist() == sorted(sum(rows, []))
    for dataset, n in (("imagenet20", 260), ("folder", 9)):
        config = sfrik.parse_args(["--dataset", dataset, "--validate"])
        assert [len(sfrik.split_rows(torch.zeros(n + i).long(), config)[1]) for i in (0, 1)] == [0, 1]

def test_imagenet20_from_end_to_end(tmp_path, monkeypatch, capsys):
    """Trained on 260 images of a class, and evaluated on the validation or on the other images."""
    write_arrays(tmp_path / "photos", train=630, val=17)
    line = "--dataset imagenet20 --arch small --size 32 --batch-size 64 --epochs 1 --projector 32-32"
    argv = [*line.split(), "--data-root", str(tmp_path / "photos")]
    drawn, probe = [], sfrik.linear_probe

    def spied(draw, labels, test, test_labels):
        drawn.append((len(draw()), labels.bincount().tolist(), len(test_labels)))
        return probe(draw, labels, test, test_labels, epochs=1)

    monkeypatch.setattr(sfrik, "linear_probe", spied)
    sfrik.main([*argv, "--out", str(tmp_path / "run")])
    assert drawn[1:] == [(4, [2, 2], 17), (52, [26, 26], 17), (520, [260, 260], 17)]
    results = json.loads((tmp_path / "run" / "results.json").read_text())
    for name in "knn_top1_k10 knn_top1_k200 linear_top1_1pc linear_top1_10pc linear_top1 svm_top1".split():
        assert 0 <= results[name] <= 100
    assert results["knn_top1_k200"] == results["knn_top1"]
    train, bank, test = sfrik.load_data(sfrik.parse_args([*argv, "--validate"]), CPU)
    assert len(test[1]) == 110 and bank[0] is train[0] and len(train[1]) == 520
    sums = [set(split[0].flatten(1).sum(1).tolist()) for split in (train, test)]
    assert not sums[0] & sums[1]
    write_arrays(tmp_path / "photos", train=520, val=17)  # with nothing to hold out the file stays mapped
    assert "hold out" in stopped(capsys, *argv, "--validate", script=sfrik)
    images, _ = sfrik.load_photos(tmp_path / "photos", "train")
    monkeypatch.setattr(sfrik, "load_photos", lambda root, split: (images, torch.arange(520) % 2))
    assert sfrik.load_data(sfrik.parse_args(argv), CPU)[0][0].data_ptr() == images.data_ptr()

# ------------------------------------------------------------------------------------ homomorphic

def test_nce_loss_is_equation_2():
    v, want = torch.randn(2, 5, 4, dtype=torch.float64, requires_grad=True), 0
    e = lambda a, b: torch.exp(F.cosine_similarity(a, b, dim=0) / 0.3)
    for i in range(5):
        others = [(j, k, l) for k in range(5) if k != i for j in range(2) for l in range(2)]
        want -= torch.log(e(v[0][i], v[1][i]) / sum(e(v[j][i], v[l][k]) for j, k, l in others)) / 5
    loss = homomorphic.nce_loss(*v, 0.3)
    assert loss.item() == pytest.approx(want.item(), rel=1e-12)
    slopes = (torch.autograd.grad(value, v)[0] for value in (loss, want))
    assert torch.allclose(*slopes, rtol=1e-9, atol=1e-12)

def test_transforms():
    x = torch.rand(4, 2, 9, 9)
    turned = homomorphic.transform(x, torch.tensor([0, 1, 2, 3]), "rotation")
    for k in range(4):
        assert torch.equal(turned[k], torch.rot90(x[k], k, (-2, -1)))
    assert torch.equal(homomorphic.transform(x, 1, "rotation")[:, :, 0], x[:, :, :, -1])
    g = torch.tensor([[0, 0], [2, 3], [-4, 1], [0, -9]])  # down and right
    for image, (down, right), got in zip(x, g.tolist(), homomorphic.transform(x, g, "translation")):
        want = torch.zeros_like(image)
        inside = [(i, j) for i in range(9) for j in range(9) if 0 <= i - down < 9 and 0 <= j - right < 9]
        for i, j in inside:
            want[:, i, j] = image[:, i - down, j - right]
        assert torch.equal(got, want)
    for factor in (0.57, 0.8, 1.0, 1.5):
        want = TF.affine(x, 0, [0, 0], factor, [0], InterpolationMode.BILINEAR)
        got = homomorphic.transform(x, torch.full((4,), factor), "scale")
        assert torch.allclose(homomorphic.transform(x, factor, "scale"), got)
        assert torch.allclose(got[..., 1:-1, 1:-1], want[..., 1:-1, 1:-1], atol=1e-5)
    assert torch.allclose(homomorphic.transform(x, 1.0, "scale"), x, atol=1e-6)

def test_a_sslss_draws_are_from_the_papers_ranges():
    x = torch.zeros(20_000, 1, 28, 28)
    shift = homomorphic.draw_group(x, "translation")
    assert shift.shape == (20_000, 2) and shift.unique().tolist() == list(range(-5, 6))  # 20 %
    turns = homomorphic.draw_group(x, "rotation")
    assert torch.allclose(turns.bincount(minlength=4) / 20_000, torch.full((4,), 0.25), atol=0.02)
    factor = homomorphic.draw_group(x, "scale")
    assert 0.57 <= factor.min() < 0.575 and 0.995 < factor.max() <= 1
    assert factor.mean().item() == pytest.approx((0.57 + 1) / 2, abs=0.005)

def test_the_basis_is_hermite_gaussian():
    for scale in (1.0, 1.5):
        basis, grid = homomorphic.hermite_gaussians(9, 4, scale), (np.arange(9) - 4) / scale
        for n, m in itertools.product(range(4), range(4)):
            he = [np.polynomial.hermite_e.HermiteE.basis(k)(grid) for k in (n, m)]
            want = np.outer(*he) * np.exp(-np.add.outer(grid**2, grid**2) / 2) / scale**2
            assert np.allclose(basis[4 * n + m].numpy(), want, atol=1e-12)

def test_bases_of_the_groups():
    basis = homomorphic.make_basis("rotation", 7, 3)
    for k in range(4):
        assert torch.equal(basis[k], basis[0].rot90(k, (1, 2)))
    assert torch.allclose(basis.flatten(2).norm(dim=2), torch.ones(4, 9))
    assert torch.equal(homomorphic.make_basis("translation", 7, 3)[0], basis[0])
    basis = homomorphic.make_basis("scale", 7, 3)
    sides = [7 - 2 * (plane[0, 3] == 0).nonzero().numel() // 2 for plane in basis]
    assert basis.shape == (6, 9, 7, 7) and sides == [5, 5, 5, 7, 7, 7]  # basis A: smaller grids for smaller scales
    least = homomorphic.hermite_gaussians(5, 3, 1.0).flatten(1).norm(dim=1).float()
    for plane, scale, side in zip(basis, homomorphic.SCALES, sides):
        raw = homomorphic.hermite_gaussians(side, 3, scale).float() / least[:, None, None]
        edge = (7 - side) // 2
        assert torch.allclose(plane[:, edge:edge + side, edge:edge + side], raw, atol=1e-6)

def homo_method(*flags, group="translation", n=12, dtype=torch.float32):
    """A method whose norms do not start at the identity, its images on the canvas, and as uint8."""
    config = homomorphic.parse_args(tiny(homomorphic, "unused", "--group", group, *flags))
    torch.manual_seed(0)
    method = homomorphic.Method(config).to(dtype)
    if dtype == torch.float64:  # which f would round
        method.f = lambda x: method.encoder((x - method.mean) / method.std)
    for norm in (m for m in method.modules() if isinstance(m, torch.nn.BatchNorm3d)):
        torch.nn.init.uniform_(norm.weight, 0.5, 1.5)
        torch.nn.init.uniform_(norm.bias, -0.5, 0.5)
    images = homomorphic.draw_patterns(n, 3)[0]
    return method, method.canvas(images.to(dtype) / 255), images

@pytest.mark.parametrize("arch", ("small", "mnist", "resnet20"))
def test_rotation_is_equivariant_at_every_depth(arch):
    flags = ["--arch", arch, *["--width", "0.06"] * (arch == "resnet20")]
    method, x, _ = homo_method(*flags, group="rotation", dtype=torch.float64, n=4)
    turns = torch.tensor([0, 1, 2, 3])
    z, w = x, homomorphic.transform(x, turns, "rotation")
    for layer in method.encoder.layers:
        z, w = layer(z), layer(w)
        assert (homomorphic.act(z, turns, "rotation") - w).norm() < 1e-12 * w.norm()
        assert (z - w).norm() > 1e-3 * w.norm()  # not invariant
        assert torch.equal(homomorphic.act(z, 1, "rotation")[:, :, 1], z[:, :, 0].rot90(1, (-2, -1)))

def test_for_rotation_both_methods_are_one():
    """Equal losses and gradients, with planes drawn to match: a turn by g moves plane g0 - g to g0."""
    def contrast(method, images, *fibers):
        """The contrastive loss of given fibers."""
        method.draw_fibers = lambda n: fibers
        return method(images, torch.zeros(len(images)).long())[1]["contrast"]

    h_ssl, x, images = homo_method(group="rotation", dtype=torch.float64)
    a_ssl, _, _ = homo_method("--ssl", "augmented", group="rotation", dtype=torch.float64)
    g1, g2, g0 = torch.randint(4, (3, len(x)))
    x = x.float().double()  # as forward computes it
    a_ssl.views = lambda images: [homomorphic.transform(x, g, "rotation") for g in (g1, g2)]
    loss, other = contrast(h_ssl, images, (g0 - g1) % 4, (g0 - g2) % 4), contrast(a_ssl, images, g0, None)
    assert abs(loss - other) < 1e-12 * max(1, abs(other))
    gradients = (torch.autograd.grad(value, [*method.encoder.parameters()])
                 for value, method in ((loss, h_ssl), (other, a_ssl)))
    for a, b in zip(*gradients, strict=True):
        assert (a - b).norm() < 1e-10 * b.norm()
    assert abs(contrast(h_ssl, images, (g0 + g1) % 4, (g0 + g2) % 4) - other) > 1e-3

@pytest.mark.parametrize("group", ("translation", "rotation", "scale"))
def test_views_are_what_the_fibers_see(group):
    """H-SSL: the fiber of x that was drawn is the central or first one of the view. A-SSL: what it embeds."""
    method, x, images = homo_method(group=group, dtype=torch.float64)
    method.eval()
    x, z = x.float().double(), method.f(x.float().double())
    if group == "translation":  # so near the middle that neither sees the border: 17 pixels wide
        (row1, row2), (column1, column2) = torch.randint(7, 10, (2, 2, 12))
        fibers = 16 * row1 + column1, 16 * row2 + column2
        base = torch.full((12,), 16 * 8 + 8)
    else:
        fibers, base = torch.randint(homomorphic.PLANES[group], (2, 12)).unbind(0), torch.zeros(12).long()
    method.draw_fibers = lambda n: fibers
    for view, fiber in zip(method.views(images), fibers, strict=True):
        if group == "scale":  # layers are far from equivariant to scale
            factor = 1 / torch.tensor(homomorphic.SCALES)[fiber]
            assert torch.allclose(view.double(), homomorphic.transform(x, factor.double(), "scale"), atol=1e-6)
        else:
            assert torch.allclose(method.read(method.f(view.double()), base), method.read(z, fiber), atol=1e-9)
    method, x, images = homo_method("--ssl", "augmented", group=group)
    torch.manual_seed(1)
    views = method.views(images)
    torch.manual_seed(1)
    for view in views:
        assert torch.equal(view, homomorphic.transform(x, homomorphic.draw_group(x, group), group))

def test_act_of_translation_and_scale():
    z = torch.rand(2, 3, 1, 6, 6)
    moved, known = homomorphic.act(z, torch.tensor([[1, 2], [0, -3]]), "translation")
    assert torch.equal(moved[0, :, 0, 1:, 2:], z[0, :, 0, :-1, :-2])
    assert torch.equal(moved[1, :, 0, :, :3], z[1, :, 0, :, 3:])
    assert known[0].sum() == 3 * 5 * 4 and known[1].sum() == 3 * 6 * 3 and (moved[~known] == 0).all()
    z = torch.rand(2, 3, 6, 8, 8)
    moved, known = homomorphic.act(z, (1, 3), "scale")  # the maps grow, too
    assert torch.equal(moved[:, :, 3], homomorphic.transform(z[:, :, 1], 1.5 / 1.25, "scale"))
    assert known[:, :, 3].all() and not known[:, :, [0, 1, 2, 4, 5]].any()

def test_sizes_that_break_the_group_are_refused():
    for size in (17, 19, 21, 23, 33):  # any odd size from 17 up
        assert homomorphic.GroupEncoder("rotation")(torch.rand(2, 3, size, size)).shape[:3] == (2, 64, 4)
    for shape, word in (((2, 3, 32, 32), "odd"), ((2, 3, 33, 31), "odd"), ((2, 3, 27, 27), "stride")):
        with pytest.raises(ValueError, match=word):  # 27 -> 14, and then a stride
            homomorphic.GroupEncoder("rotation", 3, "mnist", 0.1)(torch.rand(shape))

def test_networks_have_the_papers_shapes():
    for line, *shape in (
        ("--dataset mnist --group translation", 32, 1, 7, 7), ("--dataset mnist --group rotation", 32, 4, 8, 8),
        ("--dataset mnist --group scale", 32, 6, 7, 7), ("--dataset cifar10 --group scale", 128, 6, 8, 8),
        ("--dataset cifar10 --group rotation", 128, 4, 9, 9), ("--dataset tinyimagenet --group scale", 128, 6, 8, 8),
        ("--dataset cifar10 --group scale --structure none --width 0.0625", 32, 6, 8, 8),
        ("--dataset mnist --group translation --structure none", 32, 1, 4, 4),
    ):
        method = homomorphic.Method(homomorphic.parse_args(["--width", "0.25", *line.split()]))
        method.to(CPU, memory_format=torch.channels_last)  # which train asks for
        channels, side = (1, 28) if "mnist" in line else (3, 64 if "tinyimagenet" in line else 32)
        images = torch.randint(256, (2, channels, side, side)).byte()
        assert list(method.f(method.canvas(images / 255)).shape[1:]) == shape, line
        assert method.classify(images / 255).shape == (2, 200 if "tiny" in line else 10)
        method(images, torch.zeros(2).long())[0].backward()
        assert all(p.grad.isfinite().all() for p in method.parameters())
    convs = [layer[0] for layer in homomorphic.GroupEncoder("scale", 1, "mnist").layers]
    assert [conv.weight.shape for conv in convs] == [(32, 1, 121), (64, 32, 9), (128, 64, 9)]
    assert [(conv.stride, conv.padding) for conv in convs] == [(1, 5), (2, 3), (2, 3)]
    encoder = homomorphic.GroupEncoder("scale", 3, "resnet20", 0.1)
    first, _, *blocks = encoder.layers
    assert isinstance(first, homomorphic.GroupConv)  # no norm where it lifts
    assert [block.conv2.weight.shape[0] for block in blocks] == 3 * [13] + 3 * [26] + 3 * [51]
    assert encoder.strides == [1, 1, 1, 1, 1, 2, 1, 1, 2, 1, 1]
    assert homomorphic.GroupEncoder("scale", 3, "tiny", 0.1).strides == [1, 1, 1, 1, 2, 1, 2, 1, 2, 1]
    resnet = homomorphic.Method(homomorphic.parse_args(["--dataset", "cifar10", "--width", "0.05"]))
    assert isinstance(resnet.h[0], torch.nn.BatchNorm1d) and kinds(homo_method()[0].h) == "LBRLBRLB"

def test_layers_by_hand():
    conv, x = homomorphic.GroupConv("scale", 3, 4, 7, 3, 1, 3), torch.rand(2, 3, 6, 9, 9)
    kernel = torch.einsum("oif,fyx->oiyx", conv.weight, conv.basis[4])  # planes are filtered alone
    assert torch.allclose(conv(x)[:, :, 4], F.conv2d(x[:, :, 4], kernel, padding=3), atol=1e-5)
    layers = homomorphic.GroupEncoder("scale", 1, "resnet20", 0.1).layers.eval()
    wide, same = layers[5], layers[6]  # the first two of the second stage
    x = torch.randn(2, wide.norm1.num_features, 6, 9, 9)  # statistics are of all planes
    y = F.relu(wide.norm1(x))
    skip = torch.einsum("oi,bilyx->bolyx", wide.widen.weight, y[..., ::2, ::2])
    z = wide(x)
    assert torch.allclose(z, skip + wide.conv2(F.relu(wide.norm2(wide.conv1(y)))), atol=1e-4)
    assert torch.allclose(same(z), z + same.conv2(F.relu(same.norm2(same.conv1(F.relu(same.norm1(z)))))), atol=1e-4)
    assert same.widen is None and isinstance(wide.norm1, torch.nn.BatchNorm3d)
    conv, norm, _ = homomorphic.GroupEncoder("scale", 1, "mnist", structure="none").layers[1]
    assert conv.weight.shape == (6 * 64, 6 * 32, 7, 7) and norm.num_features == 6 * 64  # of each plane

def test_classifiers_by_hand():
    z = torch.randn(4, 8, 6, 7, 7)
    pooled = homomorphic.Classifier(homomorphic.parse_args(["--quick", "--group", "scale"]), 8, 7).eval()
    want = pooled.linear(F.relu(pooled.norm(z.max(2).values)).mean((2, 3)))
    assert torch.allclose(pooled(z), want, atol=1e-5)
    steered = homomorphic.Classifier(homomorphic.parse_args(["--group", "scale"]), 8, 7)
    for side in (7, 8):  # the mean over space comes first
        z = torch.randn(4, 8, 6, side, side)
        want = steered.linear(steered.conv(z).mean((3, 4)).max(2).values)
        assert torch.allclose(steered(z), want, atol=1e-5)

def test_the_mlp_of_table_2():
    """Three linear layers, each with BatchNorm and ReLU as the convolution that it replaces."""
    encoder = homomorphic.GroupEncoder("translation", 1, "mnist", structure="none", image_size=28)
    [layers] = encoder.layers
    assert kinds(layers) == "FLBRLBRLBRU"
    shapes = [tuple(layer.weight.shape) for layer in layers if isinstance(layer, torch.nn.Linear)]
    assert shapes == [(784, 784), (1024, 784), (2048, 1024)] and encoder.channels == 128
    x = torch.rand(3, 1, 28, 28)
    assert torch.equal(encoder(x), layers[:-1](x).view(3, 128, 1, 4, 4))  # 16 rows of 128

def test_homomorphic_and_augmented_forward():
    rows, zero = torch.arange(12), torch.zeros(12).long()
    method, x, images = homo_method("--temperature", "0.3")
    torch.manual_seed(1)
    loss, terms = method(images, zero)
    assert method.encoder.layers[0][1].num_batches_tracked == 1  # one forward pass
    torch.manual_seed(1)
    g1, g2 = method.draw_fibers(12)
    z = method.encoder(normalised(homomorphic, x))
    v = [method.h(z[rows, :, 0, g // 16, g % 16]) for g in (g1, g2)]
    contrast = homomorphic.nce_loss(*v, 0.3)
    classifier = F.cross_entropy(method.classifier(z.detach()), zero)
    assert loss.item() == pytest.approx((contrast + classifier).item(), rel=1e-5)
    assert terms["contrast"].item() == pytest.approx(contrast.item(), rel=1e-5)
    method, x, images = homo_method("--ssl", "augmented", "--temperature", "0.3")
    torch.manual_seed(1)
    _, terms = method(images, zero)
    assert method.encoder.layers[0][1].num_batches_tracked == 3
    torch.manual_seed(1)
    shifts = [torch.randint(-6, 7, (12, 2)) for _ in range(2)]  # 20 % of 32 pixels
    g0, _ = method.draw_fibers(12)
    maps = [method.f(homomorphic.transform(x, shift, "translation")) for shift in shifts]
    v = [method.h(z[rows, :, 0, g0 // 16, g0 % 16]) for z in maps]
    assert terms["contrast"].item() == pytest.approx(homomorphic.nce_loss(*v, 0.3).item(), rel=1e-5)
    method.eval()
    _, terms = method(images, zero)  # the classifier sees the image as it is
    want = F.cross_entropy(method.classifier(method.f(x)), zero)
    assert terms["classifier"].item() == pytest.approx(want.item(), rel=1e-5)
    assert torch.allclose(method.features(images / 255), method.f(x).mean((2, 3, 4)), atol=1e-5)

def test_what_each_mode_trains():
    for ssl in ("homomorphic", "augmented", "frozen", "supervised"):
        method, _, images = homo_method("--ssl", ssl, group="scale")
        assert (method.h is not None) == (ssl in ("homomorphic", "augmented"))
        torch.manual_seed(1)
        method(images, torch.zeros(12).long())[0].backward()
        for p in method.encoder.parameters():
            assert (p.grad is not None and p.grad.abs().sum() > 0) == p.requires_grad == (ssl != "frozen")
        assert all(p.grad is not None for p in method.classifier.parameters())
        if ssl == "homomorphic":  # the classifier trains nothing but itself
            both = [p.grad.clone() for p in method.encoder.parameters()]
            method.zero_grad()
            torch.manual_seed(1)
            method(images, torch.zeros(12).long())[1]["contrast"].backward()
            for a, p in zip(both, method.encoder.parameters()):
                assert torch.allclose(a, p.grad, atol=1e-5)

def test_fibers_are_drawn_within_the_distance():
    pairs = lambda shape, *flags: homomorphic.fiber_pairs(homomorphic.parse_args(["--quick", *flags]), shape)
    assert len(pairs((1, 4, 4))) == 16**2 and len(pairs((6, 9, 9), "--group", "scale")) == 36
    near = pairs((1, 5, 6), "--distance", "1.5")
    apart = torch.stack([near[:, 0] // 6 - near[:, 1] // 6, near[:, 0] % 6 - near[:, 1] % 6]).float().norm(dim=0)
    assert apart.max() == pytest.approx(2**0.5) and near.unique().tolist() == [*range(30)]
    assert len(pairs((1, 5, 5), "--distance", "1.2")) == 25 + 4 * 20  # Euclidean: no diagonals
    assert len(pairs((4, 9, 9), "--group", "rotation", "--distance", "1")) == 4 + 2 * 3  # no circle
    assert len(pairs((6, 9, 9), "--group", "scale", "--base-size", "3")) == 16  # a base space must fit on the axis
    assert pairs((4, 9, 9), "--group", "rotation", "--base-size", "2").max() == 2  # planes 2 and 3, but not 3 and 0
    first, second = homo_method()[0].draw_fibers(4000)
    assert (first != second).float().mean() > 0.98  # drawn independently
    for group, fiber, read in (("rotation", 2, lambda z: [z[:, :, k].mean((2, 3)) for k in (2, 3)]),
                               ("translation", 2 * 16 + 5, lambda z: [z[:, :, 0, 2, k] for k in (5, 6)])):
        method, x, _ = homo_method("--base-size", "2", group=group)
        z = method.f(x)
        assert torch.allclose(method.read(z, torch.full((12,), fiber)), torch.cat(read(z), 1), atol=1e-6)
    many = torch.cat(method.draw_fibers(4000))
    assert (many % 16).max() == z.shape[4] - 2 and (many // 16).max() == z.shape[3] - 1

def test_accuracy_of_the_classifier():
    method, _, _ = homo_method("--width", "0.25", group="rotation")
    images, labels = homomorphic.draw_patterns(300, 5)
    found = torch.cat([method.eval().classify(image[None] / 255).argmax(1) for image in images])
    method.train()
    want = 100 * (found == labels).float().mean().item()
    assert homomorphic.classifier_accuracy(method, images, labels) == pytest.approx(want) and method.training
    assert homomorphic.classifier_accuracy(method, images, found) == 100

def test_images_of_another_size_are_resized():
    """--size is the side that training and evaluation see; for rotation a black border makes it odd."""
    images = homomorphic.draw_patterns(4, 3)[0]
    for group, side in (("scale", 24), ("rotation", 25)):
        method, _, _ = homo_method("--size", "24", "--width", "0.25", group=group)
        x = method.canvas(images / 255)
        assert x.shape == (4, 3, side, side) and torch.equal(x[..., :24, :24], TF.resize(images / 255, [24, 24]))
        assert not x[..., 24:, :].any() and not x[..., 24:].any()
        assert torch.equal(homomorphic.middle(images / 255, method.config), x[..., :24, :24])

def test_files_of_mnist(tmp_path, monkeypatch, capsys):
    raw, line = tmp_path / "MNIST" / "raw", ["--batch-size", "64", "--out", tmp_path / "run", "--data-root"]
    raw.mkdir(parents=True)
    number = lambda *values: b"".join(value.to_bytes(4, "big") for value in values)
    for part, n in (("train", 250), ("t10k", 30)):
        gray_values = bytes(i % 251 for i in range(n * 784))
        (raw / f"{part}-images-idx3-ubyte").write_bytes(number(2051, n, 28, 28) + gray_values)
        (raw / f"{part}-labels-idx1-ubyte").write_bytes(number(2049, n) + bytes(i % 10 for i in range(n)))
    config = homomorphic.parse_args(f"--batch-size 64 --limit 100 --data-root {tmp_path}".split())
    data = homomorphic.load_data(config, CPU)
    assert [images.shape for images, _ in data] == [(k, 1, 28, 28) for k in (100, 100, 30)]
    assert data[2][1].tolist() == [i % 10 for i in range(30)] and data[2][0].dtype == torch.uint8
    assert data[2][0][1, 0].flatten().tolist() == [i % 251 for i in range(784, 2 * 784)]
    images = raw / "train-images-idx3-ubyte"
    images.write_bytes(images.read_bytes()[:-5])
    message = stopped(capsys, *line, tmp_path, script=homomorphic)
    assert "MNIST is damaged" in message and "remove it" in message

    def no_network(root, train, download):
        (Path(root) / "MNIST" / "raw").mkdir(parents=True)
        raise RuntimeError("Error downloading train-images:\nTried a\nTried b")

    monkeypatch.setattr(datasets, "MNIST", no_network)
    message = stopped(capsys, *line, tmp_path / "new", script=homomorphic)
    assert "new/MNIST is missing" in message and "train-images: Tried a Tried b" in message

def test_homomorphics_presets():
    parse = lambda line="": homomorphic.parse_args(line.split())
    c = parse()
    assert (c.dataset, c.group, c.epochs, c.batch_size, c.lr) == ("mnist", "translation", 500, 4096, 0.1)
    assert (c.warmup_epochs, c.weight_decay, c.temperature, c.projector) == (10, 1e-4, 0.1, "128-128-128")
    for dataset, arch in (("cifar10", "resnet20"), ("tinyimagenet", "tiny")):
        c = parse(f"--dataset {dataset}")
        assert (c.arch, c.epochs, c.projector) == (arch, 1300, "512-2048-512")
    assert (c.classes, c.size, parse("--dataset folder").classes) == (200, 64, 1000)
    method = homomorphic.Method(parse("--width 0.1 --lr 0.5"))
    optimizer = homomorphic.make_optimizer(method, method.config)
    assert isinstance(optimizer, homomorphic.LARS) and optimizer.decay == 1e-4 and optimizer.defaults["lr"] == 0.5
    assert type(homomorphic.make_optimizer(method, parse("--quick"))) is torch.optim.SGD

# ----------------------------------------------------------------------------------- photonics_reg

# golden: MPB 1.11.1 at resolution 32. Permittivity: lowest and highest, then the ten levels between as
# digits, row by row, packed; 10^5 times the frequencies of 6 bands at every 125th wave vector; 10^4 times
# the labels at every 10th point
MPB = (5.983953468395142, 15.256928779970995,
       "eNrF0jsSwCAIBNArgYqf+18sM2BSZNwlXWgfRpYoElXXrirHssT7z57N9+TrZ5fMLXHdPoBL2w3IZYQrcp3uDX6g8AHuDIob/AbD"
       "7hkm9lhCwQ3sF3124U7mr3x8z4/3G48w2U6nl5PpyuLhJ3fj7/8+/vYLYAnHtQ==",
       "21516 23161 27792 28908 47100 48319 18123 22870 27778 34963 42121 52947 16016 20307 32785 36940 "
       "41623 47161 16266 20612 31753 37979 40282 48525 18760 23637 26838 33696 43158 52066",
       "15365 16967 18619 20330 22095 23980 26070 28532 32694 35886 30571 26865 27019 28306 36584 38265 "
       "37043 43858 47243 47034 38101 46693 49242 50942 52503 54301 56140 57947 58365 62949")

X_OF_LABELS = 1.2 / 499 * torch.arange(400, dtype=torch.float64)

def golden_cell():
    low, high, packed, *numbers = MPB
    digits = zlib.decompress(base64.b64decode(packed)).decode()
    eps = low + (high - low) / 9 * torch.tensor([int(x) for x in digits], dtype=torch.float64)
    frequencies, labels = (torch.tensor([int(x) for x in line.split()]).double() for line in numbers)
    return eps.view(1, 32, 32), frequencies.view(5, 6) / 1e5, labels / 1e4

def test_the_error_of_a_dos_equals_the_authors():
    target = wave(6, 400, 0.2, 0.01).abs() + 1
    prediction = target + 0.1 * wave(6, 400, 0.5, 0.03)
    prediction[:, :100] += 5  # these points do not count
    assert photonics_reg.dos_error(prediction, target) == pytest.approx(0.039136776600480754, rel=1e-12)

def test_labels_equal_mpbs():
    eps, want, labels = golden_cell()
    frequencies, _ = photonics_reg.photonic_bands(eps, photonics_reg.wave_vectors()[::125], 6)
    some = want > 0.05
    assert ((frequencies[0] - want).abs() < 2e-3 * want)[some].all() and some.sum() >= 29
    got = photonics_reg.density_of_states(eps)[0, 100::10]
    assert (got - labels).abs().sum() < 2e-3 * labels.sum()

def test_group_velocities_are_derivatives():
    eps, k = golden_cell()[0], torch.tensor([[0.31, -0.17], [0.05, 0.42]]).double()
    _, velocities = photonics_reg.photonic_bands(eps, k, 5)
    for axis, step in enumerate(1e-5 * torch.eye(2, dtype=torch.float64)):
        ahead, behind = (photonics_reg.photonic_bands(eps, k + s * step, 5)[0] for s in (1, -1))
        assert torch.allclose(velocities[..., axis], (ahead - behind) / 2e-5, atol=1e-6)

def test_labels_are_invariant():
    eps = golden_cell()[0]
    y, empty = photonics_reg.density_of_states(eps, 3), photonics_reg.empty_lattice(CPU)
    moves = (eps.roll((5, 9), (1, 2)), eps.flip(1), eps.flip(2), eps.rot90(1, (1, 2)), eps.mT, 1.7 * eps)
    for moved in moves:
        assert (photonics_reg.density_of_states(moved, 3) - y).abs().max() < 1e-10
    assert (photonics_reg.density_of_states(eps.roll(1, 1) * eps, 3) - y).abs().max() > 0.1
    # a homogeneous cell has the labels of the empty lattice
    assert torch.allclose(empty.double(), 2 * math.pi * X_OF_LABELS, rtol=1e-6)
    y = photonics_reg.density_of_states(torch.full((1, 32, 32), 6.0, dtype=torch.float64))
    assert photonics_reg.dos_error(y, empty[None].double()) < 2e-4

def test_states_are_distributed_exactly():
    """A trapezoid's integral, against many points of the square; nothing is lost or doubled."""
    frequencies = torch.tensor([0.3, 0.5, 0.52, 0.6], dtype=torch.float64)
    velocities = torch.tensor([[0.7, -0.2], [0.0, 0.5], [0.4, 0.4], [0, 0]], dtype=torch.float64)
    edges = torch.linspace(0.28, 0.62, 60, dtype=torch.float64)
    line = ((torch.arange(400) + 0.5) / 400 - 0.5) / 25
    dk = torch.cartesian_prod(line, line).double()
    got = photonics_reg.states_below(edges, frequencies, velocities)
    for f, v, below in zip(frequencies, velocities, got):
        assert torch.allclose(below, ((f + dk @ v)[:, None] < edges).double().mean(0), atol=0.01)

def test_the_label_is_the_smoothed_count_of_states():
    """All 625 wave vectors, fine bins and the Gaussian by hand: time reversal, scales, the sum of states."""
    k = photonics_reg.wave_vectors()
    eps = photonics_reg.draw_cells("gpm", 1, 3)
    frequencies, velocities = photonics_reg.photonic_bands(eps, k, 6, 2)
    assert frequencies[0, 312, 0] < 1e-6 and k[312].abs().max() < 1e-12
    frequencies[0, 312, 0] = math.inf  # the one state that does not count
    root, edges = eps.mean().sqrt(), 0.0015 / 4 * torch.arange(8001, dtype=torch.float64)
    below = photonics_reg.states_below(edges, root * frequencies[0], root * velocities[0])
    counts, centers = below.sum((0, 1)).diff() / 625, (edges[1:] + edges[:-1]) / 2
    assert counts.sum().item() == pytest.approx(6 - 1 / 625, abs=1e-10) and (counts > -1e-12).all()
    got, at_gamma = photonics_reg.density_of_states(eps, 2)[0], (root * frequencies[0, 312, 1]).item()
    for j in (3, 150, 260, 399, min(399, round(at_gamma / X_OF_LABELS[1].item()))):
        weight = sum(torch.exp(-((X_OF_LABELS[j] - s * centers) ** 2) / (2 * 0.01**2)) for s in (1, -1))
        want = (counts * weight).sum() / (0.01 * math.sqrt(2 * math.pi))
        assert got[j].item() == pytest.approx(want.item(), rel=2e-3, abs=2e-4)
    assert at_gamma < 0.9  # so that one place is at this state, which counts once

def test_bands_of_cells_on_a_gpu_are_solved_on_the_cpu():
    with FakeTensorMode():  # tensors without numbers, on any machine
        eps = torch.empty(1, 32, 32, device="cuda")
        for bands in photonics_reg.photonic_bands(eps, torch.empty(3, 2), 2, 1):
            assert bands.device == CPU
        assert photonics_reg.density_of_states(eps, 1).device == CPU

def test_gpm_cells_follow_the_published_law():
    """Cells by the definition: complex Fourier sum, quantile, mean of 3 x 3 points."""
    cells = photonics_reg.draw_cells("gpm", 40, 3)
    assert torch.equal(photonics_reg.draw_cells("gpm", 7, 3), cells[:7]) and cells.shape == (40, 32, 32)
    assert torch.allclose(cells.flip(1), cells) and not torch.allclose(cells.flip(2), cells)  # x -> -x
    assert 1 <= cells.min() and cells.max() <= 20
    drawn = torch.rand(40, 16, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    fine, ends = (torch.arange(96).double() + 0.5) / 96 - 0.5, torch.linspace(-0.5, 0.5, 50).double()

    def field(u, line):
        x, y = torch.meshgrid(line, line, indexing="ij")
        value = 0
        for g1, (i, g2) in itertools.product((-1, 0, 1), enumerate((-1, 0, 1))):
            r, phi = u[3 * abs(g1) + i], 2 * math.pi * u[6 + 3 * abs(g1) + i]
            value = value + r * torch.exp(1j * (phi + 2 * math.pi * (g1 * x + g2 * y)))
        return value.real

    for cell, u in zip(cells[:9], drawn):
        inside = field(u, fine) > np.quantile(field(u, ends), 0.01 + 0.98 * u[12])
        want = F.avg_pool2d(torch.where(inside, *(1 + 19 * u[14:16]))[None], 3)[0]
        assert torch.allclose(cell, want, atol=1e-9)

def test_blob_cells_have_one_centered_inclusion():
    cells = photonics_reg.draw_cells("blob", 30, 4)
    drawn = torch.rand(30, 16, generator=torch.Generator().manual_seed(4), dtype=torch.float64)
    line = (torch.arange(96).double() + 0.5) / 96 - 0.5
    z = torch.complex(*torch.meshgrid(line, line, indexing="ij"))
    for cell, u in zip(cells.double(), drawn):
        eps_in, eps_out = 1 + 19 * u[14], 1 + 19 * u[15]
        waves = [(2 * u[n] - 1) / n * torch.cos(n * z.angle() + 2 * math.pi * u[4 + n]) for n in range(1, 5)]
        inside = z.abs() < ((0.1 + 0.3 * u[0]) * (1 + 0.3 * sum(waves))).clamp(max=0.48)
        want = F.avg_pool2d(torch.where(inside, eps_in, eps_out)[None], 3)[0]
        assert torch.allclose(cell, want, atol=1e-5)

def test_views_of_cells():
    """Against torch's own flip, rot90 and roll, one by one; and the law of the draws."""
    cells = torch.rand(60, 32, 32)
    wanted = {("gpm", False): (range(3), [0], range(32)), ("gpm", True): (range(3), range(4), range(32)),
              ("blob", False): (range(3), range(4), [0]), ("blob", True): (range(3), range(4), (0, 16))}
    for (kind, transformed), law in wanted.items():
        drawn = photonics_reg.draw_symmetries(60, kind, transformed, CPU)
        got = photonics_reg.apply_symmetries(cells, *drawn)
        for cell, view, flip, turn, shift in zip(cells, got, *drawn):
            want = cell if flip == 0 else cell.flip(int(flip) - 1)
            assert torch.equal(view, want.rot90(int(turn)).roll(tuple(shift.tolist()), (0, 1)))
        many = photonics_reg.draw_symmetries(30_000, kind, transformed, CPU)
        assert len(many[2].unique(dim=0)) == len(law[2]) ** 2  # each direction by itself
        for values, drawn in zip(law, many):
            got, n = drawn.unique(return_counts=True)
            assert got.tolist() == [*values]
            assert torch.allclose(n / n.sum(), torch.tensor(1 / len(values)), atol=0.02)

def test_versions_of_the_pretext_task():
    cells = torch.rand(3, 32, 32)
    for kind, classes in (("gpm", [0, 1, 0, 1]), ("blob", [0, 1, 2, 3])):
        every, target = photonics_reg.versions(cells, kind)
        assert target.tolist() == [label for label in classes for _ in range(3)]
        for k, part in enumerate(every.split(3)):
            shift = 16 * (k // 2), 16 * (k % 2)
            want = cells.rot90(k, (1, 2)) if kind == "gpm" else cells.roll(shift, (1, 2))
            assert torch.equal(part, want)
    # no pixel betrays half a turn: the plane that mirrors a gpm cell mirrors the turned one, too
    every, _ = photonics_reg.versions(photonics_reg.draw_cells("gpm", 12, 5), "gpm")
    for part, axis in zip(every.split(12), (1, 2, 1, 2)):
        assert torch.allclose(part.flip(axis), part) and not torch.allclose(part.flip(3 - axis), part)

def photonics_method(line="", split=0):
    """A method, ten cells, and the same view by hand."""
    config = photonics_reg.parse_args(f"--arch small --batch-size 10 {line}".split())
    draw = lambda: photonics_reg.draw_symmetries(10, config.dataset, "+transform" in line, CPU)
    view = lambda cells: photonics_reg.apply_symmetries(cells, *draw())
    return photonics_reg.Method(config, split), photonics_reg.draw_cells(config.dataset, 10, 6).float(), view

def test_photonics_networks_are_the_released_ones():
    count = lambda net: sum(p.numel() for p in net.parameters())
    method, tuned = (photonics_reg.Method(photonics_reg.Config("blob"), split) for split in (0, 1))
    assert count(method.encoder) == 5_331_712 and count(method.projector) == 919_808
    assert count(method.predictor) == 790_532 and method.regressor is None
    assert count(tuned.regressor) == 2_829_200 and tuned.projector is tuned.predictor is None
    assert kinds(method.encoder) == "CBRM" * 3 + "FLRL" and kinds(tuned.regressor) == "LR" * 3 + "L"
    assert [method.encoder[i].kernel_size for i in (3, 7, 11)] == [2, 4, 4]
    assert method.encoder[0].padding == (3, 3) and method.encoder[0].padding_mode == "zeros"
    for head in (method.projector, method.predictor):
        assert kinds(head) == "LBRLBRL" and head[1] is head[4]

@pytest.mark.parametrize("mode, kind", [*itertools.product(photonics_reg.MODES[1:], ("gpm", "blob"))])
def test_photonics_pretraining_is_the_algorithm(mode, kind):
    method, cells, view = photonics_method(f"--mode {mode} --dataset {kind} --alpha 2")
    torch.manual_seed(1)
    loss, terms = method(cells, torch.zeros(10))
    torch.manual_seed(1)
    f = lambda cells: method.encoder((cells[:, None] - 1) / 19)
    want = photonics_reg.nt_xent(*(method.projector(f(view(cells))) for _ in range(2)), 0.1)
    assert terms["invariance"].item() == pytest.approx(want.item(), rel=1e-5)
    assert ("equivariance" in terms) == (mode == "essl")
    if mode == "essl":
        every, target = photonics_reg.versions(cells, kind)
        logits = method.predictor(f(every))
        assert logits.shape == (40, {"gpm": 2, "blob": 4}[kind])
        want = want - 2 * sum(row[label] for row, label in zip(logits.log_softmax(1), target)) / 40
        right = sum(int(row.argmax() == label) for row, label in zip(logits, target))
        assert terms["transform_top1"].item() == pytest.approx(100 * right / 40)
    assert loss.item() == pytest.approx(want.item(), rel=1e-5)
    loss.backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in method.parameters())

@pytest.mark.parametrize("mode, absolute", (("essl", ""), ("essl", "--absolute"), ("simclr+transform", "")))
def test_photonics_fine_tuning_is_a_regression_of_the_difference(mode, absolute):
    """On a view as in the mode's pre-training, by squared errors (code) or absolute ones (paper)."""
    method, cells, view = photonics_method(f"--mode {mode} {absolute}", 1)
    labels, empty = torch.rand(10, 400), (2 * math.pi * X_OF_LABELS).float()
    torch.manual_seed(1)
    loss, terms = method(cells, labels)
    torch.manual_seed(1)
    wrong = method.regressor(method.encoder((view(cells)[:, None] - 1) / 19)) - (labels - empty)
    want = wrong.abs().mean() if absolute else (wrong**2).mean()
    assert loss.item() == pytest.approx(want.item(), rel=1e-5) and terms == {}
    before = state(method)
    got = photonics_reg.predict(method, cells)
    assert method.training and unchanged(method, before) and not got.requires_grad
    method.eval()
    output = method.regressor(method.encoder((cells[:, None] - 1) / 19))
    assert torch.allclose(got, output + empty, atol=1e-5)

def test_photonics_presets():
    parse = lambda line: photonics_reg.parse_args(line.split())
    gpm, blob, quick = parse(""), parse("--dataset blob"), parse("--quick --mode simclr")
    assert (gpm.mode, gpm.epochs, gpm.batch_size, gpm.lr, gpm.alpha) == ("essl", 200, 256, 1e-3, 5)
    assert (gpm.tune_epochs, gpm.tune_batch_size, gpm.tune_lr, gpm.absolute) == (100, 64, 1e-4, False)
    assert (gpm.limit, gpm.unlabelled, gpm.test, gpm.splits) == (3000, 20480, 2000, 3)
    assert (blob.limit, blob.unlabelled, blob.test) == (3000, 15000, 1999)
    assert (quick.mode, quick.arch, parse("--quick").mode) == ("simclr", "small", "all")
    adam, sgd = (photonics_reg.make_optimizer(photonics_method(split=i)[0], gpm) for i in (1, 0))
    assert type(adam) is torch.optim.Adam and type(sgd) is torch.optim.SGD
    assert (adam.defaults["lr"], adam.defaults["weight_decay"]) == (1e-4, 1e-5)
    assert (sgd.defaults["lr"], sgd.defaults["momentum"], sgd.defaults["weight_decay"]) == (1e-3, 0.9, 0)

def test_photonics_data(tmp_path):
    """No cell is in two of the three sets; splits take six sevenths of the same pool."""
    config = photonics_reg.parse_args(tiny_photonics(tmp_path / "run", "--splits", "3", "--seed", "5"))
    (unlabelled, nothing, test), *splits = photonics_reg.load_data(config, CPU)
    rows = lambda cells: {tuple(x) for x in cells.flatten(1).tolist()}
    wanted, pool, ours = (photonics_reg.draw_cells("gpm", n, seed).float() for n, seed in ((64, 99), (37, 1), (8, 2)))
    assert torch.equal(unlabelled[0], wanted) and torch.equal(test[0], ours) and nothing is None
    assert len(rows(torch.cat([wanted, pool, ours]))) == 64 + 37 + 8
    for train, validation, same in splits:
        assert len(train[0]) == 32 and same is test and rows(train[0]) | rows(validation[0]) == rows(pool)
        for cells, labels in (train, validation, test):
            direct = photonics_reg.density_of_states(cells[:2].double(), 1)
            assert len(cells) == len(labels) and torch.allclose(labels[:2], direct.float(), atol=1e-3)
    assert len({frozenset(rows(train[0])) for train, _, _ in splits}) == 3

def test_computed_labels_are_kept(tmp_path, monkeypatch, capsys):
    """On the CPU, whatever the device; a computation that was stopped goes on."""
    config = photonics_reg.parse_args(["--cutoff", "1", "--data-root", str(tmp_path)])
    label, calls = lambda n, device=CPU: photonics_reg.labelled_cells(config, n, 1, device)[1], []
    solve = photonics_reg.density_of_states

    def counted(eps, cutoff):
        calls.append(eps.device)
        if len(calls) == 12:  # of 20 cells, the first 8 are kept already
            raise KeyboardInterrupt
        return solve(eps, cutoff)

    monkeypatch.setattr(photonics_reg, "density_of_states", counted)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
    with pytest.raises(KeyboardInterrupt):
        label(20)
    calls[:] = [CPU] * 100
    whole = label(20)
    assert torch.equal(label(6), whole[:6]) and label(20, torch.device("meta")).is_meta  # as on a GPU
    assert calls == [CPU] * 112 and torch.equal(whole, solve(photonics_reg.draw_cells("gpm", 20, 1), 1).float())
    [path] = (tmp_path / "photonics").iterdir()
    sound = torch.load(path, weights_only=True)
    for damage in (b"PK", sound | {"made_by": [25, 6, 0.02]}, [1]):
        path.write_bytes(damage) if isinstance(damage, bytes) else torch.save(damage, path)
        line = tiny_photonics(tmp_path / "run", "--data-root", str(tmp_path))
        assert str(path) in stopped(capsys, *line, script=photonics_reg)

def test_every_epoch_has_its_place_and_every_step_its_rate(tmp_path, monkeypatch):
    """Pre-training: a cosine of SGD's rate over 4 steps; each of two splits: Adam's, 6 steps alike."""
    def plan(*line):
        return [(x, n, (c.epochs, c.batch_size)) for x, n, c in photonics_reg.stages(photonics_reg.parse_args(line))]

    tune = [(split, number, (3, 64)) for split in (1, 2) for number in (1, 2, 3)]
    few = ["--epochs", "2", "--tune-epochs", "3", "--splits", "2"]
    assert plan(*few) == [(0, 1, (2, 256)), (0, 2, (2, 256)), *tune] and plan(*few, "--pretrained", "x") == tune
    assert plan(*few, "--mode", "supervised") == tune
    rates = spied_rates(photonics_reg, monkeypatch)
    photonics_reg.main(tiny_photonics(tmp_path / "run", "--eval-every", "2"))
    log = torch.load(tmp_path / "run" / "checkpoint.pt", weights_only=True)["log"]
    assert [line["epoch"] for line in log if "test_error" in line] == [4, 5, 7, 8]  # always after the last
    cosine = [0.005 * (1 + math.cos(math.pi * step / 4)) for step in range(4)]
    assert sum(rates, []) == pytest.approx(cosine + [1e-3] * 12)

def test_every_step_of_cells_draws_anew_and_every_epoch_follows_from_its_number():
    """The order and views of an epoch; the weights at the start of a stage."""
    config, epochs = photonics_reg.parse_args(tiny_photonics("unused")), []
    for config.seed, split, epoch in ((0, 0, 1), (0, 0, 2), (0, 1, 1), (3, 0, 1), (0, 0, 1)):
        batches = photonics_reg.batches((torch.arange(75), -torch.arange(75)), config, split, epoch)
        steps = [(cells.tolist(), labels.tolist(), torch.rand(1).item()) for cells, labels in batches]
        assert all(cells == [-label for label in labels] and len(cells) == 32 for cells, labels, _ in steps)
        assert len({*steps[0][0], *steps[1][0]}) == 64
        epochs.append(steps)
    assert epochs[4] == epochs[0] and len({str(steps[0][0]) for steps in epochs}) == 4
    assert len({draw for steps in epochs[:4] for _, _, draw in steps}) == 8
    heads = [photonics_reg.begin(config, split, None, CPU)[0].regressor[0].weight for split in (1, 2, 1)]
    assert torch.equal(heads[0], heads[2]) and not torch.equal(heads[0], heads[1])

@pytest.fixture(scope="module")
def four_modes(tmp_path_factory):
    out = tmp_path_factory.mktemp("photonics") / "run"
    photonics_reg.main(tiny_photonics(out, "--mode", "all"))
    return out

def test_a_run_of_all_modes(four_modes, monkeypatch, capsys):
    read = lambda out: json.loads((out / "results.json").read_text())
    files, whole = "checkpoint.pt config.json encoder.pt metrics.jsonl results.json views.png", read(four_modes)
    for mode in photonics_reg.MODES:
        out, results = four_modes / mode, read(four_modes / mode)
        start, *log = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
        assert start["epoch"] == 0 and {"command", "torch", "device", "threads"} <= start.keys() & results.keys()
        tuned = [line for line in log if line["split"]]
        for name, choose in (("", lambda part: part[2]),
                             ("_validation_minimum", lambda part: min(part, key=lambda x: x["validation_error"])),
                             ("_test_minimum", lambda part: min(part, key=lambda x: x["test_error"]))):
            chosen = [choose(part)["test_error"] for part in (tuned[:3], tuned[3:])]
            assert results[f"dos_error{name}"] == pytest.approx(np.mean(chosen), rel=1e-3)
            assert results[f"dos_error{name}_std"] == pytest.approx(np.std(chosen), rel=1e-3)
        for name in ("dos_error", "dos_error_std"):
            assert results[name] == whole[name.replace("error", f"error_{mode}")]
        saved = torch.load(out / "checkpoint.pt", weights_only=True)
        assert saved["config"] == json.loads((out / "config.json").read_text()) and saved["log"] == [start, *log]
        config = photonics_reg.Config(**saved["config"])
        data, method = photonics_reg.load_data(config, CPU), photonics_reg.Method(config, 2)
        method.load_state_dict(saved["method"])  # of the last split
        for name, (cells, labels) in zip(("validation_error", "test_error"), data[2][1:]):
            error = 100 * photonics_reg.dos_error(photonics_reg.predict(method, cells), labels)
            assert error == pytest.approx(log[-1][name], rel=1e-5)
        assert unchanged(method.encoder, torch.load(out / "encoder.pt", weights_only=True))
        drawn = [name for name in files.split() if mode != "supervised" or name != "views.png"]
        assert sorted(path.name for path in out.iterdir()) == drawn
    assert results["transform_top1"] == pytest.approx(log[1]["transform_top1"], rel=1e-3)  # of the last, essl
    empty = photonics_reg.dos_error(photonics_reg.empty_lattice(CPU).expand_as(labels), labels)
    assert whole["dos_error_empty_lattice"] == pytest.approx(100 * empty, rel=1e-3)
    assert whole["dos_error"] == whole["dos_error_essl"] and (whole["epochs"], whole["seed"]) == (2, 0)
    times = {path: path.stat().st_mtime_ns for path in four_modes.glob("*/*")}
    monkeypatch.setattr(photonics_reg, "load_data", None)
    photonics_reg.main(tiny_photonics(four_modes, "--mode", "all"))  # finished, at once
    assert times == {path: path.stat().st_mtime_ns for path in four_modes.glob("*/*")} and read(four_modes) == whole
    printed = capsys.readouterr().out
    assert printed.count("is finished") == 5 and printed.count("compare.py") == 4
    line = tiny_photonics(four_modes, "--mode", "simclr")  # would put its results in place of those of all
    assert "of --mode all" in stopped(capsys, *line, script=photonics_reg) and read(four_modes) == whole
    assert re.search(rf"dos_error_supervised +{whole['dos_error_supervised']} % ", printed)

def test_results_of_cells_are_written_again_and_are_of_the_run(four_modes, tmp_path, monkeypatch, capsys):
    """Damaged files that do no harm; another run in the folder; results without a checkpoint."""
    whole, out = four_modes / "simclr", tmp_path / "run"
    shutil.copytree(whole, out)
    line = tiny_photonics(out, "--mode", "simclr")
    (out / "results.json").unlink()
    for name in ("config.json", "encoder.pt", "metrics.jsonl"):
        (out / name).write_bytes(b"\xff{")
    photonics_reg.main(line)
    assert (out / "results.json").read_text() == (whole / "results.json").read_text() and unharmed(out, whole)
    assert torch.load(out / "encoder.pt").keys() == torch.load(whole / "encoder.pt").keys()
    with monkeypatch.context() as patch:
        patch.setattr(photonics_reg, "load_data", None)  # refused before labels are computed
        message = stopped(capsys, *line, "--cutoff", "2", script=photonics_reg)
    assert "cutoff was 1, is 2" in message and "--out" in message
    (out / "checkpoint.pt").unlink()
    interrupted(photonics_reg, 6, [*line, "--save-every", "0"], monkeypatch, capsys)
    assert not (out / "results.json").exists()

def test_fine_tuning_starts_from_the_pretrained_encoder(four_modes, tmp_path, monkeypatch):
    """In every split; also from another run's, single or of all modes; frozen, it stays so, but for
    BatchNorm's statistics, as in the authors' code."""
    starts, begin = [], photonics_reg.begin
    saved = torch.load(four_modes / "simclr" / "checkpoint.pt", weights_only=True)["pretrained"]

    def spied(*args):
        method, optimizer = begin(*args)
        starts.append(unchanged(method.encoder, saved))
        return method, optimizer

    monkeypatch.setattr(photonics_reg, "begin", spied)
    line = ["--mode", "simclr"]
    photonics_reg.main(tiny_photonics(tmp_path / "whole", *line))
    for run in (four_modes, four_modes / "simclr"):
        out = tmp_path / run.name
        photonics_reg.main(tiny_photonics(out, *line, "--frozen", "--pretrained", str(run)))
        frozen = torch.load(out / "checkpoint.pt", weights_only=True)["method"]
        for name, value in saved.items():
            statistics = "running" in name or "tracked" in name
            assert torch.equal(frozen[f"encoder.{name}"], value) != statistics
        assert json.loads((out / "results.json").read_text())["epoch"] == 6
    assert starts == [False, True, True] + [True, True] * 2

PHOTONICS_BAD = [
    ("--epoch 3", "--epoch"), ("gpm", "gpm"), ("--dataset cifar10", "blob"), ("--mode moco", "simclr+transform"),
    ("--epochs 0", "epochs must be more than 0"), ("--lr nan", "lr must be"),
    ("--tune-weight-decay -1", "weight-decay must be 0 or more"), ("--batch-size 1", "2 or more"),
    ("--limit 5", "6 or more"), ("--device tpu", "tpu"), ("--out /dev/null", "/dev/null"),
    ("--cutoff 8", "--cutoff must be less than 8"), ("--batch-size 65", "more than the 64 cells"),
    ("--tune-batch-size 33", "more than the 32 cells"), ("--data-root /dev/null/data", "/dev/null/data"),
    ("--mode all --pretrained nowhere", "nowhere/checkpoint.pt: FileNotFoundError"),
    ("--pretrained RUN --arch paper", "arch was small, is paper"),
    ("--pretrained RUN/essl --mode simclr", "mode was essl, is simclr"),
    ("--pretrained RUN/new", "not ended its pre-training"), ("", "start it without torchrun"),
    ("--mode all --out RUN/essl", "Choose another --out"),
]

def test_photonics_bad_input(four_modes, tmp_path, monkeypatch, capsys):
    saved = torch.load(four_modes / "essl" / "checkpoint.pt", weights_only=True)
    shutil.copytree(four_modes, tmp_path / "run")
    (tmp_path / "run" / "new").mkdir()
    torch.save(saved | {"pretrained": None}, tmp_path / "run" / "new" / "checkpoint.pt")
    for flags, words in PHOTONICS_BAD:
        monkeypatch.setenv("WORLD_SIZE", "2" if "torchrun" in words else "")
        line = tiny_photonics(tmp_path / "out", *flags.replace("RUN", str(tmp_path / "run")).split())
        assert words in stopped(capsys, *line, script=photonics_reg), flags
        assert not (tmp_path / "out" / "metrics.jsonl").exists()
    parse = lambda line: photonics_reg.parse_args(line.split())
    assert parse("--frozen --pretrained x/y/").out == "runs/photonics_reg-frozen=True-pretrained=y"
    assert parse("--pretrained=~/x").pretrained == os.path.expanduser("~/x")

# ----------------------------------------------------------------------------------------- compare

def test_wahba_recovers_a_rotation():
    f, turn = F.normalize(torch.randn(50, 6, dtype=torch.float64)), orthogonal(6)
    assert torch.allclose(compare.wahba_rotation(f, f @ turn.T, reflections=True), turn, atol=1e-9)
    for sign in (1, -1):  # near a rotation, and near a reflection
        turn[:, 0] *= sign * torch.sign(torch.det(turn))
        g = F.normalize(f @ turn.T + 0.3 * torch.randn(50, 6, dtype=torch.float64))
        for reflections in (False, True):  # the closed form, for rows of length 1
            u, s, vt = torch.linalg.svd(g.T @ f)
            s[-1] *= 1 if reflections else torch.sign(torch.det(u @ vt))
            closed = (2 * 50 - 2 * s.sum()).sqrt().item()
            assert compare.wahba_error(f, g, reflections) == pytest.approx(closed, rel=1e-9)

def test_relative_equivariance():
    f, g = F.normalize(torch.randn(2, 20, 4, dtype=torch.float64), dim=2)
    assert compare.relative_equivariance(f, f @ orthogonal(4)) < 1e-20
    assert math.isnan(compare.relative_equivariance(f, f))
    square, ratios = lambda a, b: (a - b).square().sum().item(), []
    for i, j in itertools.combinations(range(20), 2):
        change = square(g[i], g[j]) - square(f[i], f[j])
        ratios.append(change**2 / (square(g[i], f[i]) + square(g[j], f[j])) ** 2)
    assert compare.relative_equivariance(f, g) == pytest.approx(np.mean(ratios), rel=1e-9)

def test_geometry_measures_what_it_says(monkeypatch):
    """With embeddings that every second augmentation rotates, and every other one reflects."""
    method, images = batch_of(simclr_essl, n=40)
    images, seen = images[:1].expand(40, -1, -1, -1), []
    monkeypatch.setattr(compare, "AUGMENTATIONS", 4)
    measure = lambda: compare.geometry(method, images, compare.augmented)
    assert str(measure()) == str(measure())
    f, turn = F.normalize(torch.randn(40, 5, dtype=torch.float64)), orthogonal(5)
    turn = turn * torch.det(turn)  # in 5 dimensions: a rotation
    mirror = turn * torch.tensor([-1.0, 1, 1, 1, 1], dtype=torch.float64)

    def embed(method, images, view=None):
        if view is None:
            return f
        views = view(images)
        assert torch.equal(views, views[:1].expand_as(views))  # one augmentation for all
        seen.append(views[0])
        return f @ (turn if len(seen) % 2 else mirror)

    monkeypatch.setattr(compare, "embed", embed)
    got = measure()
    assert len(seen) == 4 and not torch.allclose(seen[0], seen[1])
    assert got["wahba_o"] < 1e-10 and got["gamma_f"] < 1e-20
    left = (f @ compare.wahba_rotation(f[:20], (f @ mirror)[:20]).T - f @ mirror)[20:]  # the other half
    want = left.norm().item() / 20**0.5 / 2
    assert got["wahba_so"] == pytest.approx(want) and want > 0.01
    moved = [(f - f @ m).norm(dim=1).mean().item() for m in (turn, mirror)]
    assert got["moved"] == pytest.approx(sum(moved) / 2)
    assert (got["width"], got["images"], got["draws"]) == (5, 40, 4)
    monkeypatch.setattr(compare, "embed", lambda *args: torch.ones(40, 21))
    got = measure()  # none moves; 20 rows fit any rotation of 21 dimensions
    assert all(math.isnan(got[name]) for name in ("gamma_f", "wahba_so", "wahba_o"))

@of_scripts([simsiam_essl, care])
def test_embeddings_are_of_the_projector_in_eval_mode(script):
    method, images = batch_of(script)
    z = compare.embed(method, images)
    method.eval()
    want = F.normalize(method.projector(method.encoder(normalised(script, images / 255))))
    assert torch.allclose(z, want, atol=1e-5)
    cosines = compare.positive_cosines(method, images)
    assert cosines.shape == (16,) and cosines.min() < 0.9995
    x, percent = compare.histogram(torch.tensor([-1.0, -0.99, 0.02, 1.0000001]))
    assert percent[0] == 50 and percent[20] == percent[39] == 25 and x[0] == pytest.approx(-0.975)

def test_retrieval(monkeypatch):
    """By an encoder of the mean hue, a recoloured image finds images of its colour; overlap is small."""
    hue, red = torch.linspace(0, 1, 361)[:-1], torch.zeros(360, 3, 8, 8)
    red[:, 0] = 0.8
    images = (simsiam_essl.shift_hue(red, hue[:, None, None, None]) * 255).byte()

    def embed(method, images):
        red, green, blue = TF.convert_image_dtype(images).mean((2, 3)).T
        return F.normalize(torch.stack([2 * red - green - blue, 3**0.5 * (green - blue)], 1))

    monkeypatch.setattr(compare, "embed", embed)
    overlap, before, after, recoloured = compare.retrieve(None, images, images[::2])
    assert overlap < 5 and ((before - torch.arange(0, 360, 2)[:, None] + 180) % 360 - 180).abs().max() < 5
    cosines = (embed(None, recoloured)[:, None] * embed(None, images[after.flatten()]).view(180, 5, 2)).sum(2)
    assert cosines.min() > math.cos(math.radians(5))
    votes = [torch.tensor([[9.0, 8, 7, 6, 5, 0, 0]]), torch.tensor([[5.0, 6, 7, 8, 0, 9, 0]])]
    answers = iter([torch.eye(7), *votes])  # four of five stay, in another order
    monkeypatch.setattr(compare, "embed", lambda *args: next(answers))
    assert compare.retrieve(None, images[:7], images[:1])[0] == pytest.approx(80)

def test_r2_says_how_much_is_known():
    """1 of the parameters themselves, 0 of constant features, and of a written-out sum."""
    t = torch.randn(2000, 3) * torch.tensor([1.0, 3, 10])
    z = compare.standardised(t, 1000)
    assert z[:1000].mean(0).abs().max() < 1e-5 and z[:1000].std(0) == pytest.approx([1, 1, 1])
    fit, score = z.split(1000)
    for read, least in ((compare.read_by_ridge, 0.999), (compare.read_by_mlp, 0.97)):
        error, answers = read(fit, fit, score)
        assert compare.r2_score(answers, score) > least and error < 0.03
        error, answers = read(0 * fit, fit, 0 * score)
        assert abs(compare.r2_score(answers, score)) < 0.01 and error == pytest.approx(1, abs=0.2)
    guess = t + 0.3 * torch.randn(2000, 3)
    ratios = [1 - ((guess[:, p] - t[:, p]) ** 2).mean() / t[:, p].var(correction=0) for p in range(3)]
    assert compare.r2_score(guess, t) == pytest.approx(sum(ratios).item() / 3, rel=1e-4)
    assert math.isnan(compare.r2_score(torch.ones(5, 1), torch.zeros(5, 1)))  # a constant parameter
    assert compare.standardised(torch.ones(13, 2), 9).abs().max() == 0

def test_readouts_are_chosen_on_the_held_out_fifth(monkeypatch):
    """Nothing can be known: the MLP's last epoch has -0.27, ridge regression with the penalty 1 -0.09."""
    x, t = torch.randn(2000, 100), torch.randn(2000, 1)
    for read, least in ((compare.read_by_ridge, -0.02), (compare.read_by_mlp, -0.1)):
        error, answers = read(x[:1000], t[:1000], x[1000:])
        assert compare.r2_score(answers, t[1000:]) > least and 0.8 < error < 1.2
        # the error is that of the first fifth, which the MLP does not learn from
        y = torch.cat([t[:200] + 100, t[200:1000]])
        far, answers = read(x[:1000], y, x[1000:])
        assert 9000 < far < 11000 and (answers.std() > 0.6) == (read is compare.read_by_ridge)
    data = compare.Data(torch.zeros(40, 3, 9, 9).byte(), torch.zeros(40), 20)
    _, parameters = compare.draw_values("rotation", 40, 9)
    answers = compare.standardised(parameters, 20)[20:]
    monkeypatch.setattr(compare, "extract", lambda method, images, view: torch.randn(40, 4))
    for errors, best in (((0.1, 0.2), "ridge"), ((0.2, 0.1), "mlp")):
        monkeypatch.setattr(compare, "read_by_ridge", lambda *args: (errors[0], answers))
        monkeypatch.setattr(compare, "read_by_mlp", lambda *args: (errors[1], 0.5 * answers))
        known = compare.what_is_known("rotation", None, torch.randn(40, 4), data)
        assert known["best"] == known[best] and known["ridge"] != known["mlp"]

def test_transformations():
    """Draws are the same for every run; operations equal torchvision's; those of colour leave gray images alone."""
    x = simclr_essl.draw_patterns(300, 0)[0] / 255
    theirs = {"brightness": (-0.4, 0.4, lambda x, v: TF.adjust_brightness(x, 1 + v)),
              "contrast": (-0.4, 0.4, lambda x, v: TF.adjust_contrast(x, 1 + v)),
              "saturation": (-0.4, 0.4, lambda x, v: TF.adjust_saturation(x, 1 + v)), "hue": (-0.1, 0.1, TF.adjust_hue),
              "blur": (0.1, 2, lambda x, v: TF.gaussian_blur(x, 13, v)),
              "flip": (0, 1, lambda x, v: TF.hflip(x) if v else x),
              "rotation": (0, 3, lambda x, v: TF.rotate(x, 90 * v)),
              "crop": (0, 32, lambda x, box: TF.resized_crop(x, *map(int, box), [32, 32], antialias=True))}
    assert theirs.keys() == set(compare.TRANSFORMATIONS)
    for name, (low, high, operation) in theirs.items():
        torch.manual_seed(1)
        values, parameters = compare.draw_values(name, 300, 32)
        torch.manual_seed(2)
        assert torch.equal(values, compare.draw_values(name, 300, 32)[0]) and len(parameters) == 300
        assert low <= values.min() < low + 0.01 and high - 0.02 < values.max() <= high
        changed, gray = compare.transformed(name, x, values), compare.transformed(name, x[:, :1], values)
        for i, value in enumerate(values[:5].squeeze().tolist()):
            assert torch.allclose(changed[i], operation(x[i], value), atol=1e-5), name
        assert (name in compare.GRAY) != torch.allclose(gray, x[:, :1], atol=1e-3), name
        if name == "crop":
            areas = values[:, 2] * values[:, 3]
            assert torch.allclose(parameters, torch.cat([values[:, :2] + values[:, 2:] / 2, areas.log()[:, None]], 1))
            assert 0.18 < areas.min() / 1024 < 0.25 < 0.9 < areas.max() / 1024 <= 1
        else:
            want = F.one_hot(values, 4) if name == "rotation" else values.view(300, 1)
            assert torch.equal(parameters, want.float())
    assert compare.draw_values("flip", 300, 32)[1].mean() == pytest.approx(0.5, abs=0.1)

def test_what_features_know():
    method, _ = batch_of(simclr_essl)
    images = simclr_essl.draw_patterns(300, 0)[0]

    def known(name, images):
        data = compare.Data(images, torch.zeros(len(images)), 200)
        features = compare.extract(method, images, compare.unchanged)
        return compare.what_is_known(name, method, features, data)

    method.features = lambda V: V.mean((2, 3))  # of an image the mean: it tells its brightness
    assert known("brightness", images)["best"] > 0.5 > 0.1 > known("flip", images)["best"]

def test_accuracy_of_features(monkeypatch):
    """Classes that are points apart are known; the rate is chosen on the first fifth alone."""
    labels, calls = torch.arange(100) % 4, []
    data = compare.Data(None, labels, 80)
    features = F.one_hot(labels, 4) + 0.01 * torch.randn(100, 4)
    got = compare.accuracy(features, data)
    assert (got["knn"], got["linear"]) == (100, 100)
    worse = {0.01: 50.0, 0.1: 70.0, 1.0: 60.0}

    def probe(draw, labels, test, test_labels, lr, epochs, probes):
        calls.append((len(draw()), len(labels), len(test), lr, epochs, probes))
        return worse[lr], 0.0

    monkeypatch.setattr(compare, "linear_probe", probe)
    assert compare.accuracy(features, data) == {"knn": 100, "linear": 70, "rate": 0.1}
    assert calls == [*((64, 64, 16, rate, 50, 1) for rate in worse), (80, 80, 20, 0.1, 50, 5)]

def fewer_images(monkeypatch):
    for name, value in dict(FIT=120, SCORE=50, MOVED=50, AUGMENTATIONS=2, QUERIES=20).items():
        monkeypatch.setattr(compare, name, value)
    probe = compare.linear_probe
    monkeypatch.setattr(compare, "linear_probe", lambda *args, **how: probe(*args, **how | {"epochs": 2}))

class Pixels(torch.nn.Module):
    """A method whose features are those of 2 x 2 pixels."""

    def __init__(self, scale):
        super().__init__()
        self.encoder = torch.nn.AdaptiveAvgPool2d(2)
        self.register_buffer("mean", torch.tensor(scale))
        self.register_buffer("std", torch.ones(()))

    def features(self, x):
        assert x.shape[2:] == (8, 8) and x.dtype == torch.float32 and 0 <= x.min() <= x.max() <= 1
        return self.encoder(self.mean * x).flatten(1)

@pytest.mark.parametrize("channels", (1, 3))
def test_compare_photographs_and_gray_images(channels, tmp_path, monkeypatch):
    """Arrays mapped from the disk, of another size than the network's; of gray ones six transformations."""
    fewer_images(monkeypatch)
    pixels = np.random.default_rng(0).integers(256, size=(200, channels, 16, 24), dtype=np.uint8)
    np.save(tmp_path / "images.npy", pixels)
    images, labels = torch.from_numpy(np.load(tmp_path / "images.npy", mmap_mode="r+")), torch.arange(200) % 4
    config, limits = simclr_essl.Config(dataset="folder", size=8, limit=3, batch_size=2), []
    script = types.SimpleNamespace(middle=simclr_essl.middle, FREE=simclr_essl.FREE, SCRIPT="x", load_data=(
        lambda config, device: limits.append(config.limit) or 3 * [(images, labels)]))
    run = compare.Run("a", script, config, dict(vars(config)), {}, [{"epoch": 0}], Pixels(1.0), Pixels(2.0))
    data = compare.load_images(run, CPU)
    assert limits == [0] and config.limit == 3
    assert data.images.shape == (170, channels, 8, 8) and data.images.dtype == torch.uint8 and data.fit == 120
    rows = torch.randperm(200, generator=torch.Generator().manual_seed(0))
    assert torch.equal(data.images[120:], simclr_essl.middle(images[rows[:50]], config))
    assert torch.equal(data.labels, torch.cat([rows[:120], rows[:50]]) % 4)
    compare.compare_images([run], CPU, tmp_path)
    saved = json.loads((tmp_path / "compare.json").read_text())
    names = ["crop", "flip", "rotation", "brightness", "contrast", "blur", "saturation", "hue"]
    assert [*saved["means"][0]["r2"]] == names[:6 if channels == 1 else 8]
    assert saved["runs"]["a"][1]["name"] == "untrained, as a" and (saved["fit"], saved["score"]) == (120, 50)
    assert (tmp_path / "retrieval.png").exists() == (channels == 3)

@pytest.mark.parametrize("runs, names", (
    (["x-a-seed0 x-a-seed1", "x-b-seed=0 x-b-seed=1", "x-c"], ["a", "b", "c"]),
    (["e-simclr-seed0 e-simclr-seed1"], ["e-simclr"]),
    (["a-x", "b-x"], ["a", "b"]),
    (["seed0 seed1", "a"], ["seed0", "a"]),  # nothing would be left
    (["a-seed0 a-seed1", "a-seed2 a-seed3"], ["a-seed0", "a-seed2"])))  # alike without the seed
def test_rows_have_names_of_their_own(runs, names):
    groups = [[types.SimpleNamespace(name=name) for name in group.split()] for group in runs]
    assert compare.row_names(groups) == names

def test_compare_from_end_to_end(runs, tmp_path, monkeypatch, capsys):
    """Runs of two scripts, one of them with two seeds."""
    fewer_images(monkeypatch)
    folders = [str(runs(script)) for script in (simclr_essl, care)]
    folders.append(str(shutil.copytree(folders[0], tmp_path / "simclr_essl-seed1")))
    saved = torch.load(tmp_path / "simclr_essl-seed1" / "checkpoint.pt")
    saved["config"] |= {"seed": 1, "precision": "bf16"}
    torch.save(saved, tmp_path / "simclr_essl-seed1" / "checkpoint.pt")
    loaded = [compare.load_run(folder, "", CPU) for folder in folders]
    assert loaded[2].method.config.precision == "fp32" and len(compare.group_seeds(loaded)) == 3
    with pytest.raises(SystemExit, match="has the settings and the seed of another"):
        compare.group_seeds([loaded[0], loaded[0]])
    saved["config"]["precision"] = "fp32"
    saved["log"][-1]["knn_top1"] = 50.0  # the other runs logged none
    torch.save(saved, tmp_path / "simclr_essl-seed1" / "checkpoint.pt")
    compare.main([*folders, "--out", str(tmp_path / "all")])
    text, protocol = (tmp_path / "all" / "compare.md").read_text().split("\nWhat encoders know")
    assert text in capsys.readouterr().out and "facebookresearch/SIE" in protocol
    saved = json.loads((tmp_path / "all" / "compare.json").read_text(), parse_constant=pytest.fail)  # no NaN
    assert saved["means"][0]["geometry"]["wahba_so"] == [None, None]  # 25 images for 32 dimensions
    means, rows = {mean["name"]: mean for mean in saved["means"]}, saved["runs"]
    assert [*means] == ["simclr_essl", "care", "untrained, as simclr_essl", "untrained, as care"]
    assert means["simclr_essl"]["r2"]["hue"]["mlp"] == [rows["simclr_essl"][0]["r2"]["hue"]["mlp"], 0]
    moved = [rows[name][1]["geometry"]["moved"] for name in ("simclr_essl", "simclr_essl-seed1")]
    assert means["untrained, as simclr_essl"]["geometry"]["moved"][1] == pytest.approx(abs(moved[0] - moved[1]) / 2)
    assert moved[0] != moved[1]
    for mean in means.values():
        assert f"{mean['knn'][0]:.1f}" in text and f"{mean['r2']['hue']['best'][0]:z.2f}" in text
        assert f"{mean['r2']['rotation']['ridge'][0]:z.2f}" in text and mean["geometry"]["width"] in ([32, 0], [16, 0])
    pictures = ["cosines.png", "curves.png", "r2.png", "retrieval.png"]
    assert sorted(path.name for path in (tmp_path / "all").glob("*.png")) == pictures

def test_what_cannot_be_compared(runs, tmp_path, monkeypatch, capsys):
    refused = lambda *words: stopped(capsys, *words, "--out", tmp_path / "x", script=compare)
    whole = runs(simclr_essl)

    def changed(name, **config):
        folder = shutil.copytree(whole, tmp_path / name)
        saved = torch.load(folder / "checkpoint.pt")
        saved["config"] |= config
        torch.save(saved, folder / "checkpoint.pt")
        return folder

    assert "nowhere is not the folder of a finished run" in refused("nowhere")
    assert "same folder name" in refused(whole, whole) and "no device" in refused(whole, "--device", "x")
    assert "cannot be compared: they differ in size" in refused(whole, changed("size", size=48))
    assert "cannot be compared: they differ in dataset" in refused(whole, changed("dataset", dataset="cifar10"))
    few = changed("few", dataset="folder", data_root=str(tmp_path), batch_size=2)
    assert "first run: python prepare.py" in refused(few)
    write_arrays(tmp_path, train=4, val=9)
    assert "have 4 images" in refused(few)
    write_arrays(tmp_path, train=4, val=0)
    assert "nothing to evaluate on" in refused(few)
    folder = changed("old", x=1)  # a field that Config has no more
    assert "old cannot be loaded" in refused(folder)
    os.truncate(folder / "checkpoint.pt", 1000)
    assert "old cannot be loaded" in refused(folder)
    (folder / "checkpoint.pt").unlink()
    assert "it has no checkpoint.pt" in refused(folder)
    assert "--out" in stopped(capsys, whole, "--out", "/dev/null/x", script=compare)
    monkeypatch.setattr(compare, "measure", lambda *args: torch.empty(1 << 60))
    assert "memory is full" in refused(whole)

def test_clouds_that_turn(tmp_path, capsys):
    """A run of care.py on chains, its own measures, and compare.py's."""
    method, cloud = care.Method(care.parse_args(["--dataset", "chains"])), care.draw_chains(1, 0)[0]
    cloud = F.pad(cloud - cloud.mean(0), (0, 1), value=1.0)
    paths = compare.turned_paths(method, cloud)
    assert paths.shape == (3, 101, 2) and torch.allclose(paths[:, 0], paths[:, -1], atol=1e-4)  # circles
    assert (paths[0] - paths[1]).abs().max() > 1e-3 and (paths[1] - paths[2]).abs().max() > 1e-3
    still = compare.geometry(method, cloud.expand(40, -1, -1), lambda x, share: x)
    assert still["moved"] == 0 and still["width"] == 16
    run = tmp_path / "run"
    care.main(f"--quick --dataset chains --limit 64 --epochs 1 --batch-size 32 --knn-every 1 --out {run}".split())
    results = json.loads((run / "results.json").read_text())
    assert "knn_top1" not in results and not (run / "views.png").exists()
    for name in ("axis_mse", "axis_angle_degrees"):
        assert math.isfinite(results[name]) and math.isfinite(results["random_init_" + name])
    compare.main([str(run), "--out", str(tmp_path)])
    printed = capsys.readouterr().out
    assert "random_init_axis_angle_degrees" in printed and f"{tmp_path} has compare.json and paths.png" in printed
    rows = json.loads((tmp_path / "compare.json").read_text())
    assert [row["name"] for row in rows] == ["run", "untrained, as run"] and rows[0]["moved"] > 0.01
    assert (tmp_path / "paths.png").stat().st_size > 5000
    other = shutil.copytree(run, tmp_path / "other")
    assert "one at a time" in stopped(capsys, run, other, script=compare)

def test_spectra(runs, tmp_path, capsys):
    compare.main([str(runs(photonics_reg)), "--out", str(tmp_path)])
    assert (tmp_path / "spectra.png").stat().st_size > 10_000 and "spectra.png: four" in capsys.readouterr().out

def test_layers_of_a_run(runs, tmp_path, monkeypatch):
    fewer_images(monkeypatch)
    compare.main([str(runs(homomorphic)), "--out", str(tmp_path)])
    saved = json.loads((tmp_path / "compare.json").read_text())
    assert len(saved["means"][0]["layers"]) == len(saved["means"][0]["layers_unmoved"]) == 3
    assert "error of each layer" in (tmp_path / "compare.md").read_text()

def test_layer_errors():
    """Zero for rotation; small for translation; larger for scale; large without structure."""
    for group, structure, least, most in (
        ("rotation", "equivariant", 0, 1e-12), ("translation", "equivariant", 0, 0.1), ("scale", "equivariant", 0, 0.4),
        ("translation", "none", 0.5, 2), ("scale", "none", 0.5, 2)):
        method, x, images = homo_method("--structure", structure, group=group)
        errors, unmoved = compare.layer_errors(method, images)
        assert errors[-1] >= least and max(errors) < most and min(unmoved) > 0.1
    # the first layer by hand: plane i of the image against plane j of the magnified image
    method, x, images = homo_method(group="scale")
    got, scales, wanted = compare.layer_errors(method, images), homomorphic.SCALES, []
    layer, inner = method.eval().encoder.layers[0], slice(8, 24)
    for i in range(5):
        factor = scales[i + 1] / scales[i]
        z, w = (layer(normalised(homomorphic, y)) for y in (x, homomorphic.transform(x, factor, "scale")))
        moved = homomorphic.transform(z[:, :, i], factor, "scale")[..., inner, inner]
        here, plane = z[:, :, i + 1, inner, inner], w[:, :, i + 1, inner, inner]
        wanted.append([((a - plane).norm() / plane.norm()).item() for a in (moved, here)])
    assert [got[0][0], got[1][0]] == pytest.approx(np.mean(wanted, axis=0), rel=1e-4)

def test_r2_is_drawn_as_a_heatmap(tmp_path, monkeypatch):
    """A row for each method; numbers in the cells, and what training changed as colour and in brackets."""
    def row(name, *values):
        return {"name": name, "r2": {key: {"best": (value, 0.0)} for key, value in zip(("crop", "hue"), values)}}

    figures = []
    monkeypatch.setattr(compare.pyplot.Figure, "savefig", lambda self, path: figures.append(self))
    trained = [row("x", 0.5, 0.25), row("y", 0.9, math.nan)]
    compare.draw_r2("unused", ["x", "y"], trained, [row("u", 0.75, 0.2), row("v", 0.1, 0.0)])
    axis = figures[0].axes[0]
    assert [text.get_text() for text in axis.texts] == ["0.50\n(-0.25)", "0.25\n(+0.05)", "0.90\n(+0.80)", "nan\n(+nan)"]
    assert [label.get_text() for label in axis.get_yticklabels()] == ["x", "y"]
    assert [label.get_text() for label in axis.get_xticklabels()] == ["crop", "hue"]
    assert axis.images[0].get_array()[0].tolist() == pytest.approx([-0.25, 0.05])

# --------------------------------------------------------------------------------------- benchmark

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

def test_benchmark_of_losses_and_photographs(capsys):
    [row] = benchmark.loss_rows(16, (128,))
    assert all(row[f"{name} ms"] > 0 for name in benchmark.LOSSES)
    for name in ("sfrik L=2", "sfrik L=3"):  # without q x q elements
        assert row["vicreg GB"] * 2**30 > 4 * 128**2 > row[f"{name} GB"] * 2**30 > 4 * 16 * 128
    assert row["sfrik L=3 over vicreg"] == row["sfrik L=3 ms"] / row["vicreg ms"]
    row = benchmark.photographs_row(2)
    assert row["ratio"] == row["folder_seconds"] / row["arrays_seconds"] and row["prepare_seconds"] > 0
    with pytest.raises(SystemExit):
        benchmark.main(["simclr"])
    assert "choose a script of" in capsys.readouterr().err
