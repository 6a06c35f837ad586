"""What encoders know, side by side: finished runs of the six scripts, measured by one protocol.

Usage
  python compare.py runs/A runs/B ...   runs on images: one dataset, one size of the images
  python compare.py RUN                 a run of photonics_reg.py: pictures of predicted spectra
  python compare.py RUN                 a run of care.py on clouds: geometry, paths of turned clouds

Writes a table (compare.md), all numbers (compare.json) and pictures to the folder --out. Runs that
differ in their seed alone are one row: mean±standard deviation. Each network is also measured
untrained. The protocol, in float32 (TF32 on a GPU): up to 10,000 training images to learn from and
5,000 test images to score, always the same ones, cropped and resized as by the first run's script.

accuracy    of the features, in percent: kNN (k 200, temperature 0.1), and a linear probe on
            standardised features (50 epochs, mean of 5), whose learning rate is the best of 0.01,
            0.1 and 1 on a held-out fifth of the training images.
R^2         of the parameters of a transformation T, read from pairs of features [f(x), f(T x)].
            One T at a time, drawn alike for all networks: crop (centre and log area; the
            area is 0.2 to 1), flip, rotation (one of four), brightness, contrast and saturation
            (times 0.6 to 1.4), hue (-0.1 to 0.1 turns), blur (sigma 0.1 to 2 pixels).
            R^2 = 1 - sum of squared errors / sum of squares about the mean of the test images, for
            each parameter, then their mean (facebookresearch/SIE pools the parameters). Two
            readouts: ridge regression (penalty 1 to 10^4), and an MLP (one hidden layer of 512,
            AdamW 1e-3, weight decay 0.01, batch 256, 40 epochs). The held-out fifth chooses
            the penalty, the MLP's epoch, and which of the two is shown. compare.json has both.
geometry    of the projector's outputs (homomorphic.py: of the features) at unit length, before and
            after 10 augmentations (SimCLR's crop, flip, colours), each the same for all of 2,000
            test images. Wahba: a rotation (SO), or one with reflections (O), is fitted to half of
            the images; shown is its root mean square error on the other half, or "-" if that half
            has fewer images than an embedding has numbers (D). gamma_f of CARE, of 1,000 images: 0
            for rotations. moved: mean distance of an image's embeddings before and after. overlap:
            percent of the five nearest training images that stay when the hue of a test image is
            shifted, for 200 of them.
layers      of homomorphic.py: relative error of act(f(x), g) against f(T_g x); in brackets f(x)'s.
Do not rank features of different width by R^2, nor embeddings of different width D by geometry.
"""
import json
import math
import re
from argparse import ArgumentParser
from copy import deepcopy
from dataclasses import dataclass, replace
from pathlib import Path
from types import ModuleType

import torch
import torch.nn as nn
import torch.nn.functional as F
import torchvision.transforms.functional as TF
from matplotlib import pyplot
from torchvision.utils import make_grid

import care
import homomorphic
import photonics_reg
import sfrik
import simclr_essl
import simsiam_essl
from care import (augment, brightness, contrast, crop, draw_boxes, gaussian_blur, saturation,
                  shift_hue)
from homomorphic import PLANES, SCALES, GroupEncoder, act, transform
from simclr_essl import (extract, frame, knn_accuracy, linear_probe, random_rows, start, stop, take,
                         with_progress, write)

SCRIPTS = {"simclr_essl": simclr_essl, "simsiam_essl": simsiam_essl, "care": care, "sfrik": sfrik,
           "homomorphic": homomorphic, "photonics_reg": photonics_reg}
FIT, SCORE = 10_000, 5_000  # images to learn from and to score, at most
MOVED, AUGMENTATIONS, QUERIES = 2_000, 10, 200  # of geometry: images, draws, queries by hue
pyplot.rcParams.update({"backend": "Agg", "figure.autolayout": True, "savefig.dpi": 120,
                        "font.size": 12})

# %% RUNS ------------------------------------------------------------------------------------------
@dataclass
class Run:
    """A finished run: its script, settings and log, and its network after and before training."""
    name: str
    script: ModuleType
    config: object
    settings: dict  # the config as it was saved
    kind: dict  # dataset, size and class names of its images
    log: list
    method: nn.Module
    untrained: nn.Module
    row: dict = None  # the dict that measure returned for method
    untrained_row: dict = None

def load_run(folder, data_root, device):
    """The Run in a folder; ends the program with one line if there is none or it is damaged."""
    path = Path(folder)
    for file in ("results.json", "checkpoint.pt"):
        if not (path / file).is_file():
            stop(f"{folder} is not the folder of a finished run: it has no {file}")
    try:
        saved = torch.load(path / "checkpoint.pt", map_location="cpu", weights_only=True)
        script = SCRIPTS[saved["script"]]
        config = script.Config(**saved["config"])
        config.device, config.precision = str(device), "fp32"
        config.data_root = str(Path(data_root or config.data_root).expanduser().resolve())
        kind = {"dataset": config.dataset, "size": getattr(config, "size", None),
                "classes": saved["data"].get("class names")}
        if config.dataset in getattr(script, "PHOTOS", ()):
            kind["--data-root"] = config.data_root
        torch.manual_seed(config.seed)  # as train does: the weights before training
        if script is photonics_reg:
            untrained = script.Method(config, config.splits)  # the last split
        else:
            untrained = script.Method(config)
        method = deepcopy(untrained)
        method.load_state_dict(saved["method"])
    except Exception as problem:  # a damaged file can raise nearly anything
        stop(f"the run in {folder} cannot be loaded ({type(problem).__name__}): it is damaged, or "
             "of an older form of its script")
    return Run(path.resolve().name, script, config, saved["config"], kind, saved["log"],
               method.to(device), untrained.to(device))

def check_alike(runs):
    """Ends the program unless all runs have their own name and the same kind of images."""
    if len({run.name for run in runs}) < len(runs):
        stop("two runs have the same folder name, by which the table tells them apart: rename one")
    for run in runs:
        for what, value in run.kind.items():
            if value != runs[0].kind[what]:
                stop(f"{runs[0].name} and {run.name} cannot be compared: they differ in {what}")

@dataclass
class Data:
    """Images (N, C, S, S), uint8, and labels (N,): the first `fit` of training, then of test."""
    images: torch.Tensor
    labels: torch.Tensor
    fit: int

def load_images(run, device):
    """The Data of a run's dataset, whatever part of it the run was trained on."""
    config = replace(run.config, limit=0)
    if hasattr(config, "validate"):
        config.validate = False  # which would test on a part of the training images
    _, bank, test = run.script.load_data(config, device)
    if bank is None:
        stop(f"the data of {run.name} have nothing to evaluate on: test images and two classes")
    images, labels = [], []
    for (all_images, all_labels), count in ((bank, FIT), (test, SCORE)):
        if len(all_labels) < 5:
            stop(f"the data of {run.name} have {len(all_labels)} images: 5 are needed to learn "
                 "from, and 5 to test")
        rows = random_rows(len(all_labels), count)
        for part in rows.split(256):  # of images on a disk only these are read
            images.append(run.script.middle(take(all_images, part, device), run.config))
        labels.append(all_labels.to(device)[rows.to(device)])
    return Data(torch.cat(images), torch.cat(labels), fit=len(labels[0]))

def unchanged(x):
    """The view of an image that is the image."""
    return x

@torch.no_grad()
def embed(method, images, view=unchanged):
    """Embeddings (N, D), on the sphere, of views of images; features if there is no projector."""
    network = method.embed if hasattr(method, "embed") else method.features
    method.eval()
    parts = [network(view(TF.convert_image_dtype(part))) for part in images.split(256)]
    return F.normalize(torch.cat(parts))

# %% ACCURACY --------------------------------------------------------------------------------------
def standardised(x, fit):
    """Rows less the mean of the first `fit` rows, over their deviation; constant columns are 0."""
    mean, std = x[:fit].mean(0), x[:fit].std(0)
    return torch.where(std > 1e-6, (x - mean) / std, 0)

def accuracy(features, data):
    """kNN and linear accuracy, in percent, of features (N, D), and the probe's rate."""
    n, labels = data.fit, data.labels
    z = standardised(features, n)

    def probe(learn, test, rate, probes):
        """Accuracy on the rows `test` of a probe that learns from the rows `learn`."""
        torch.manual_seed(0)
        mean, _ = linear_probe(lambda: z[learn], labels[learn], z[test], labels[test], lr=rate,
                               epochs=50, probes=probes)
        return mean

    held_out, rest = slice(0, n // 5), slice(n // 5, n)
    rates = {rate: probe(rest, held_out, rate, probes=1) for rate in (0.01, 0.1, 1.0)}
    best = max(rates, key=rates.get)
    linear = probe(slice(0, n), slice(n, None), best, probes=5)
    knn = knn_accuracy(features[:n], labels[:n], features[n:], labels[n:], k=200, temperature=0.1)
    return {"knn": knn, "linear": linear, "rate": best}

# %% TRANSFORMATIONS -------------------------------------------------------------------------------
# operations on images (N, 3, S, S) by values (N, 1, 1, 1), and the range of the values: a change by
# -0.4 to 0.4 is a factor of 0.6 to 1.4
OPERATIONS = {"brightness": (brightness, -0.4, 0.4), "contrast": (contrast, -0.4, 0.4),
              "blur": (gaussian_blur, 0.1, 2.0), "saturation": (saturation, -0.4, 0.4),
              "hue": (shift_hue, -0.1, 0.1)}
TRANSFORMATIONS = ["crop", "flip", "rotation", *OPERATIONS]
GRAY = TRANSFORMATIONS[:-2]  # without saturation and hue

def draw_values(name, n, size):
    """Random values of a transformation for n images, and the parameters (n, P) to be read."""
    generator = torch.Generator().manual_seed(TRANSFORMATIONS.index(name))

    def uniform(low, high, draws=1):
        return torch.empty(n, draws, 1, 1).uniform_(low, high, generator=generator)

    if name == "crop":
        boxes = draw_boxes(uniform, size, size, (0.2, 1.0))
        top, left, height, width = boxes.T
        place = [top + height / 2, left + width / 2, (height * width).log()]
        return boxes, torch.stack(place, dim=1)
    if name == "rotation":
        turns = torch.randint(4, (n,), generator=generator)
        return turns, F.one_hot(turns, 4).float()
    if name == "flip":
        values = (uniform(0, 1) < 0.5).float()
    else:
        _, low, high = OPERATIONS[name]
        values = uniform(low, high)
    return values, values.flatten(1)

def transformed(name, x, values):
    """Images (N, C, S, S) in [0, 1], each transformed by its own value."""
    channels = x.shape[1]
    x = x.expand(-1, 3, -1, -1)  # the operations are for colour images
    if name == "crop":
        x = crop(x, values, x.shape[3])
    elif name == "flip":
        x = torch.where(values == 1, x.flip(3), x)
    elif name == "rotation":
        x = transform(x, values, "rotation")
    else:
        operation, _, _ = OPERATIONS[name]
        x = operation(x, values)
    return x[:, :channels]

def r2_score(prediction, target):
    """1 - sum of squared errors / sum of squares about the mean: the mean over all parameters.

    NaN if a parameter does not vary.
    """
    errors = (prediction - target).square().sum(0)
    total = (target - target.mean(0)).square().sum(0)
    constant = (target == target[0]).all(0)
    total[constant] = math.nan
    return (1 - errors / total).mean().item()

def read_by_ridge(x, t, queries):
    """Ridge regression from rows (N, D) to parameters (N, P), both standardised.

    Returns the mean squared error on the held-out first fifth, and what is read of the queries, by
    weights that are then fitted to all rows.
    """
    x, t, queries = x.double(), t.double(), queries.double()
    held = len(x) // 5
    identity = torch.eye(x.shape[1]).to(x)
    gram, product = x[held:].T @ x[held:], x[held:].T @ t[held:]
    errors = {}  # of each penalty, on the held-out fifth
    for penalty in (1, 10, 100, 1000, 10_000):
        weights = torch.linalg.solve(gram + penalty * identity, product)  # (D, P)
        errors[penalty] = F.mse_loss(x[:held] @ weights, t[:held]).item()
    best = min(errors, key=errors.get)
    weights = torch.linalg.solve(x.T @ x + best * identity, x.T @ t)
    return errors[best], queries @ weights

def read_by_mlp(x, t, queries):
    """The same two by an MLP, of the epoch with the least error on the held-out fifth."""
    torch.manual_seed(0)
    held = len(x) // 5
    mlp = nn.Sequential(nn.Linear(x.shape[1], 512), nn.ReLU(), nn.Linear(512, t.shape[1])).to(x)
    optimizer = torch.optim.AdamW(mlp.parameters(), 1e-3, weight_decay=1e-2)
    least, answers = math.inf, None
    for _ in range(40):
        order = held + torch.randperm(len(x) - held, device=x.device)
        for rows in order.split(256):
            loss = F.mse_loss(mlp(x[rows]), t[rows])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        with torch.no_grad():
            error = F.mse_loss(mlp(x[:held]), t[:held]).item()
            if error < least:
                least, answers = error, mlp(queries)
    return least, answers

def what_is_known(name, method, features, data):
    """R^2 of a transformation's parameters on the test images, by both readouts.

    features: of the images as they are. "best" is the R^2 of the readout with the smaller error on
    held-out training images.
    """
    draw = draw_values(name, len(data.images), data.images.shape[3])  # the same for all networks
    values, parameters = [part.to(features.device) for part in draw]
    after = []  # features of the transformed images
    for images, image_values in zip(data.images.split(256), values.split(256)):
        x = transformed(name, TF.convert_image_dtype(images), image_values)
        after.append(extract(method, x, unchanged))
    n = data.fit
    pairs = standardised(torch.cat([features, torch.cat(after)], dim=1), n)
    t = standardised(parameters, n)
    ridge_error, by_ridge = read_by_ridge(pairs[:n], t[:n], pairs[n:])
    mlp_error, by_mlp = read_by_mlp(pairs[:n], t[:n], pairs[n:])
    scores = {"ridge": r2_score(by_ridge, t[n:]), "mlp": r2_score(by_mlp, t[n:])}
    scores["best"] = scores["ridge"] if ridge_error < mlp_error else scores["mlp"]
    return scores

# %% GEOMETRY --------------------------------------------------------------------------------------
def wahba_rotation(f, f_a, reflections=False):
    """Wahba's problem: the rotation R (D, D), float64, that brings f R^T nearest to f_a (N, D).

    Section 4 of CARE, by the singular value decomposition; with reflections, R in O(D).
    """
    u, _, vt = torch.linalg.svd(f_a.double().T @ f.double())
    if not reflections:  # R must have determinant 1: if not, the weakest direction is flipped
        u[:, -1] *= torch.det(u @ vt).sign()
    return u @ vt

def wahba_error(f, f_a, reflections=False):
    """Frobenius norm of f R^T - f_a, both (N, D), for the R that is best for them."""
    rotation = wahba_rotation(f, f_a, reflections)
    return torch.linalg.norm(f.double() @ rotation.T - f_a.double()).item()

def held_out_wahba_error(f, f_a, reflections):
    """Root mean square of the distances of R f_i and f_a_i of the second half, R from the first."""
    half = len(f) // 2
    if f.shape[1] > half:  # too few rows to determine R
        return math.nan
    rotation = wahba_rotation(f[:half], f_a[:half], reflections)
    left = f[half:].double() @ rotation.T - f_a[half:].double()
    return left.square().sum(1).mean().sqrt().item()

def relative_equivariance(f, f_a):
    """gamma_f, section 5.2 of CARE, of embeddings (N, D) before and after one augmentation.

    The mean over pairs i < j of (|f_a_i - f_a_j|^2 - |f_i - f_j|^2)^2, each divided by
    (|f_a_i - f_i|^2 + |f_a_j - f_j|^2)^2. 0 for a rotation; pairs that did not move are left out,
    NaN if none did.
    """
    f, f_a = f.double(), f_a.double()
    change = F.pdist(f_a).square() - F.pdist(f).square()  # of all pairs i < j
    moved = (f_a - f).square().sum(1)
    both = torch.combinations(moved).sum(1).square()
    pairs = both >= 1e-12
    return (change[pairs].square() / both[pairs]).mean().item()

def augmented(x, alike=1):
    """Images in [0, 1] augmented as by SimCLR, `alike` consecutive ones in the same way."""
    views = augment(x.expand(-1, 3, -1, -1), x.shape[3], alike=alike)
    return views[:, :x.shape[1]]  # gray images stay gray

def geometry(method, images, augmentation):
    """What augmentations, each applied to all images alike, do to embeddings: means over draws.

    augmentation(x, alike) augments images or clouds, `alike` consecutive ones in the same way.
    """
    z, draws = embed(method, images), []
    for seed in with_progress(range(AUGMENTATIONS), AUGMENTATIONS, "geometry: augmentation"):
        def augment_alike(part):
            torch.manual_seed(seed)  # one augmentation for all parts, and for all networks
            return augmentation(part, len(part))

        z_a = embed(method, images, augment_alike)
        draws.append({"wahba_so": held_out_wahba_error(z, z_a, reflections=False),
                      "wahba_o": held_out_wahba_error(z, z_a, reflections=True),
                      "gamma_f": relative_equivariance(z[:1000], z_a[:1000]),
                      "moved": (z - z_a).norm(dim=1).mean().item()})
    means = {name: mean for name, (mean, _) in over_seeds(draws).items()}
    return means | {"width": z.shape[1], "images": len(z), "draws": len(draws)}

def retrieve(method, bank, queries):
    """The nearest images of queries, and of the same with another hue (section 5.3 of CARE).

    bank, queries: uint8 (N, 3, S, S). Returns the percentage of the five nearest that stay when the
    hue is shifted by 0.1 to 0.5 turns either way, the rows of the bank (M, 5) that are nearest
    before and after, and the recoloured queries.
    """
    # in turns: 0.1 to 0.5 one way, then 0.5 to 0.1 the other way
    shift = torch.linspace(0.1, 0.9, len(queries), device=queries.device)[:, None, None, None]
    recoloured = shift_hue(queries.float() / 255, shift)
    z_bank = embed(method, bank)
    before = (embed(method, queries) @ z_bank.T).topk(5).indices
    after = (embed(method, recoloured) @ z_bank.T).topk(5).indices
    stays = (before[:, :, None] == after[:, None]).any(2).float()  # (M, 5)
    return 100 * stays.mean().item(), before, after, recoloured

def positive_cosines(method, images):
    """Cosines (N,) of the embeddings of two augmented views of each image."""
    torch.manual_seed(0)
    z1, z2 = [embed(method, images, augmented) for _ in range(2)]
    return F.cosine_similarity(z1, z2)

@torch.no_grad()
def layer_errors(method, images):
    """For every layer of a GroupEncoder |act(f(x), g) - f(T_g x)| / |f(T_g x)|, Frobenius norms.

    rotation: a quarter turn, on the whole map. translation: down and right by the product of all
    strides; scale: the mean over neighbouring planes; both without the outer quarters of the map.
    Also returns the errors of f(x) itself in place of act(f(x), g). In eval mode and float64: on a
    GPU, TF32 would hide that rotation is exact.
    """
    group, strides = method.config.group, method.encoder.strides
    layers = deepcopy(method.encoder.layers).double().eval()
    x = method.canvas(images.double() / 255)
    if group == "rotation":  # elements: pairs of g for transform and g for act
        elements = [(1, 1)]
    elif group == "translation":
        pixels = torch.full((len(x), 2), math.prod(strides), device=x.device)
        elements = [(pixels, None)]  # g for act is the layer's: see below
    else:
        elements = [(SCALES[i + 1] / SCALES[i], (i, i + 1)) for i in range(len(SCALES) - 1)]
    errors, unmoved = torch.zeros(len(layers)), torch.zeros(len(layers))
    for g_x, g in elements:
        both = torch.cat([x, transform(x, g_x, group)])
        maps = (both - method.mean.double()) / method.std.double()
        for depth, layer in enumerate(layers):
            maps = layer(maps)
            # f(x) and f(T_g x), (N, C, L, H, W) each, with L planes
            z, z_g = maps.reshape(2, len(x), -1, PLANES[group], *maps.shape[-2:])
            if group == "translation":  # in places of the map, each of many pixels
                g = g_x // math.prod(strides[:depth + 1])
            moved = act(z, g, group)
            if group != "rotation":
                moved, mask = moved  # the mask: where moved comes from z
                rows, columns = [slice(side // 4, side - side // 4) for side in z.shape[3:]]
                z, z_g, moved = [(y * mask)[..., rows, columns] for y in (z, z_g, moved)]
            errors[depth] += ((moved - z_g).norm() / z_g.norm()).item()
            unmoved[depth] += ((z - z_g).norm() / z_g.norm()).item()
    return (errors / len(elements)).tolist(), (unmoved / len(elements)).tolist()

def turned_paths(method, cloud):
    """Embeddings of a cloud (P, 4) turned by 0 to 360 degrees about x, y and z: (3, 101, 2).

    In the first two principal components of all three paths; the paper's ideal is a circle each.
    """
    angle = torch.linspace(0, math.tau, 101, device=cloud.device)[:, None, None]
    axes = torch.eye(3, device=cloud.device)
    # spins[i] @ v is the cross product of axis i and v; exp(angle spins[i]) turns about axis i
    spins = torch.linalg.cross(axes[None], axes[:, None])  # (3, 3, 3)
    turns = torch.matrix_exp(angle * spins[:, None]).flatten(0, 1)  # (303, 3, 3)
    z = embed(method, care.rotate(cloud.expand(303, -1, -1), turns))
    z = z - z.mean(0)
    components = torch.linalg.svd(z, full_matrices=False).Vh[:2]
    return (z @ components.T).view(3, 101, 2).cpu()

# %% TABLE -----------------------------------------------------------------------------------------
def over_seeds(values):
    """Several results, nested alike, as one: each number becomes (mean, standard deviation)."""
    first = values[0]
    if isinstance(first, dict):
        return {key: over_seeds([value[key] for value in values]) for key in first}
    if isinstance(first, list):
        return [over_seeds(column) for column in zip(*values)]
    if isinstance(first, str):  # a name, which compare_images replaces
        return first
    numbers = torch.tensor(values, dtype=torch.float64)
    return numbers.mean().item(), numbers.std(correction=0).item()

def number(pair, digits=2):
    """Mean and, unless it is 0, standard deviation as text; "-" for what is not defined."""
    mean, std = pair
    if math.isnan(mean):
        return "-"
    # z in the format: 0.00, never -0.00
    return f"{mean:z.{digits}f}" + (f"±{std:.{digits}f}" if std > 0 else "")

def row_names(groups):
    """A name for each group of runs: that of its first run, without the seed if there are several.

    Words that all names have are left out. If two names would be alike, the runs' names stay.
    """
    words = []
    for group in groups:
        name = group[0].name
        if len(group) > 1:
            name = re.sub("-?seed=?[0-9]+", "", name)
        words.append([word for word in name.split("-") if word])
    shared = set(words[0]).intersection(*words)
    names = []
    for parts in words:
        own = [word for word in parts if word not in shared]
        names.append("-".join(own or parts))
    if "" in names or len(set(names)) < len(names):
        return [group[0].name for group in groups]
    return names

def markdown(heads, lines):
    """A table: the head of each column, and lines of as many cells."""
    rows = [heads, ["---"] * len(heads), *lines]
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)

# the first table: the head of a column, the name of its numbers, and how many digits are shown
COLUMNS = [("kNN", "knn", 1), ("linear", "linear", 1), ("Wahba SO", "wahba_so", 2),
           ("Wahba O", "wahba_o", 2), ("gamma_f", "gamma_f", 2), ("moved", "moved", 2),
           ("overlap", "overlap_at_5", 1), ("D", "width", 0)]

def tables(rows):
    """Text of all that is shown of rows, as over_seeds returns them."""
    accuracies, readouts, layers = [], [], []
    for row in rows:
        name, numbers = row["name"], row | row["geometry"]
        accuracies.append([name] + [number(numbers[key], digits) for _, key, digits in COLUMNS])
        best = [number(r2["best"]) for r2 in row["r2"].values()]
        readouts.append([name, *best, number(row["r2"]["rotation"]["ridge"])])
        if "layers" in row:
            pairs = zip(row["layers"], row["layers_unmoved"])  # [0]: the mean over seeds
            errors = [f"{error[0]:.2g} ({unmoved[0]:.2g})" for error, unmoved in pairs]
            layers.append(f"{name}, error of each layer (if f(x) is left as it is): "
                          + ", ".join(errors))
    blocks = ["Accuracy in percent, and geometry:",
              markdown(["", *(head for head, _, _ in COLUMNS)], accuracies),
              "R^2 of the parameters of each transformation:",
              markdown(["", *rows[0]["r2"], "rotation, linear"], readouts)]
    return "\n\n".join(blocks + layers) + "\n"

# %% PICTURES --------------------------------------------------------------------------------------
def draw_r2(path, names, rows, untrained):
    """R^2 of every method (row) and transformation, coloured by how training changed it."""
    def means(row):
        return [scores["best"][0] for scores in row["r2"].values()]  # [0]: the mean over seeds

    r2 = torch.tensor([means(row) for row in rows])
    gained = r2 - torch.tensor([means(row) for row in untrained])
    figure, axis = pyplot.subplots(figsize=(10, 2.5 + 0.6 * len(rows)))
    image = axis.imshow(gained.numpy(), cmap="PuOr", vmin=-0.6, vmax=0.6, aspect="auto")
    for i in range(len(rows)):
        for j, gain in enumerate(gained[i]):
            axis.text(j, i, f"{r2[i, j]:z.2f}\n({gain:+z.2f})", ha="center", va="center",
                      color="white" if abs(gain) > 0.4 else "black")
    axis.set_xticks(range(len(r2[0])), rows[0]["r2"], fontsize=10)
    axis.set_yticks(range(len(rows)), names, fontsize=10)
    axis.set_title("R^2 of the parameters of each transformation, read from features\n"
                   "(in brackets and as colour: the change by training)", fontsize=12)
    figure.colorbar(image, label="change of R^2")
    figure.savefig(path)

def histogram(cosines):
    """The middles of 40 bins from -1 to 1, and the percent of the cosines in each."""
    counts = torch.histc(cosines.clamp(-1, 1), 40, -1, 1)
    middles = torch.linspace(-0.975, 0.975, 40)
    return middles.tolist(), (100 * counts / len(cosines)).tolist()

def draw_lines(path, groups, horizontal, vertical, aspect="auto"):
    """Draws {name: lines}, each name in its own style. A line is (xs, ys), two lists of numbers."""
    figure, axis = pyplot.subplots(figsize=(8, 5))
    for i, (name, lines) in enumerate(groups.items()):
        style = f"C{i % 10}" + ("-", "--", ":", "-.")[i % 4]  # dashes: to be told without colours
        axis.plot([], [], style, label=name)  # for the legend, once
        for xs, ys in lines:
            axis.plot(xs, ys, style)
    axis.set(xlabel=horizontal, ylabel=vertical, aspect=aspect)
    axis.legend(fontsize=10)
    figure.savefig(path)

def draw_retrieval(path, name, bank, queries, before, after, recoloured):
    """Five queries with their five nearest images and, below, the same recoloured."""
    tiles, heads = [], []
    for row in torch.linspace(0, len(queries) - 1, 5).long().tolist():
        shown = [queries[row], *bank[before[row]], recoloured[row], *bank[after[row]]]
        tiles += [frame(image, "white") for image in shown]
        heads += ["as it is", "other hue"]
    figure, axis = pyplot.subplots(figsize=(7, 11))
    grid = make_grid(tiles, nrow=6, padding=0)
    axis.imshow(grid.permute(1, 2, 0).numpy())
    side = tiles[0].shape[1]
    axis.set_xticks([side * (i + 0.5) for i in range(6)], ["query", 1, 2, 3, 4, 5])
    axis.set_yticks([side * (i + 0.5) for i in range(10)], heads)
    axis.set(title=f"Test images, and the training images nearest to them\n{name}")
    figure.savefig(path)

def draw_spectra(path, run, device):
    """The first four test cells, with true and predicted density of states."""
    cells, labels = photonics_reg.labelled_cells(run.config, 4, seed=2, device=device)  # to test on
    predicted = photonics_reg.predict(run.method, cells)
    figure, axes = pyplot.subplots(4, 2, figsize=(8, 10), width_ratios=(1, 3))
    x = [i * photonics_reg.X_STEP for i in range(photonics_reg.POINTS)]
    for (left, right), cell, true, guess in zip(axes, cells, labels, predicted):
        left.imshow(cell.T.tolist(), cmap="gray_r", origin="lower")
        left.set_title(f"permittivity\n{cell.min():.1f} and {cell.max():.1f}", fontsize=10)
        left.set_axis_off()
        right.axline((0, 0), slope=math.tau, ls=":", color="gray", label="empty lattice, 2 pi x")
        right.plot(x, true.tolist(), "k-", label="solved")
        right.plot(x, guess.tolist(), "--", color="tab:red", label="predicted")
        right.set_ylabel("states per\ncell and x")
    axes[0][1].legend(fontsize=10)
    axes[3][1].set_xlabel("x: frequency times the root of the mean\npermittivity, in 2 pi c / a")
    figure.savefig(path)

# %% MAIN ------------------------------------------------------------------------------------------
def measure(name, method, data):
    """All numbers of one network, as a dict."""
    fit, score = data.images[:data.fit], data.images[data.fit:]
    names, overlap = GRAY, math.nan  # gray images have no hue
    if fit.shape[1] == 3:
        names = TRANSFORMATIONS
        overlap, *_ = retrieve(method, fit, score[:QUERIES])
    features, r2 = extract(method, data.images, unchanged), {}
    for transformation in with_progress(names, len(names), f"{name}: transformation"):
        r2[transformation] = what_is_known(transformation, method, features, data)
    row = {"name": name, "r2": r2, "geometry": geometry(method, score[:MOVED], augmented)}
    row["geometry"]["overlap_at_5"] = overlap
    row |= accuracy(features, data)
    if isinstance(method.encoder, GroupEncoder):
        row["layers"], row["layers_unmoved"] = layer_errors(method, score[:64])
    return row

def measure_all(runs, data):
    """Measures all runs. Untrained networks with the same weights are measured once."""
    rows = {}  # of untrained networks
    for run in with_progress(runs, len(runs), "run"):
        run.row = measure(run.name, run.method, data)
        # networks of the same weights have the same embeddings
        key = str(embed(run.untrained, data.images[:4]).tolist())
        if key not in rows:
            rows[key] = measure(f"untrained, as {run.name}", run.untrained, data)
        run.untrained_row = rows[key]

def group_seeds(runs):
    """Lists of the runs that differ in their seed alone."""
    groups = {}
    for run in runs:
        settings = {"script": run.script.SCRIPT, **run.settings}
        for name in ("seed", *run.script.FREE):
            del settings[name]
        group = groups.setdefault(str(settings), [])
        if run.config.seed in [other.config.seed for other in group]:
            stop(f"{run.name} has the settings and the seed of another of these runs")
        group.append(run)
    return list(groups.values())

def compare_images(runs, device, out):
    """Measures runs on images and writes the table, the numbers and the pictures."""
    data = load_images(runs[0], device)
    fit, score = data.images[:data.fit], data.images[data.fit:]
    print(f"runs: {len(runs)}. Images to learn from: {len(fit)}, to test: {len(score)}", flush=True)
    groups = group_seeds(runs)
    measure_all(runs, data)
    names, trained, untrained, once = row_names(groups), [], [], {}
    for name, group in zip(names, groups):
        trained.append(over_seeds([run.row for run in group]) | {"name": name})
        untrained.append(over_seeds([run.untrained_row for run in group]))
        # what was measured once, for several runs, is shown once
        once.setdefault(str(untrained[-1]), untrained[-1] | {"name": f"untrained, as {name}"})
    rows = trained + list(once.values())
    text = tables(rows)
    write(out / "compare.md", f"{text}\n{__doc__}")
    numbers = {"protocol": __doc__, "fit": len(fit), "score": len(score), "device": str(device),
               "torch": str(torch.__version__), "means": rows,
               "configs": {run.name: run.settings for run in runs},
               "runs": {run.name: [run.row, run.untrained_row] for run in runs}}
    write(out / "compare.json", json.dumps(numbers, indent=1).replace("NaN", "null"))

    draw_r2(out / "r2.png", names, trained, untrained)
    draw_pictures(out, names, groups, fit, score)
    print(f"{text}\n{out} has compare.md, compare.json and pictures")

def draw_pictures(out, names, groups, fit, score):
    """Pictures of groups of runs that differ in their seed alone, and of the first run."""
    curves, cosines = {}, {}
    for name, group in zip(names, groups):
        curves[name] = []
        for run in group:
            points = [(line["epoch"], line["knn_top1"]) for line in run.log if "knn_top1" in line]
            if points:  # the script logged kNN
                curves[name].append(list(zip(*points)))
        cosines[name] = [histogram(positive_cosines(group[0].method, score[:MOVED]))]
    if any(curves.values()):
        draw_lines(out / "curves.png", curves, "epoch", "kNN accuracy by the script, percent")
    draw_lines(out / "cosines.png", cosines, "cosine of the embeddings of two views of an image",
               "percent of the test images, per 0.05")
    if fit.shape[1] == 3:
        first, queries = groups[0][0], score[:QUERIES]
        _, *found = retrieve(first.method, fit, queries)
        draw_retrieval(out / "retrieval.png", first.name, fit, queries, *found)

def compare_clouds(run, device, out):
    """Geometry of a run on clouds under turns, before and after training, and its paths."""
    _, _, (clouds, _) = run.script.load_data(run.config, device)
    clouds = clouds[random_rows(len(clouds), MOVED)]
    rows = []
    for name, method in ((run.name, run.method), (f"untrained, as {run.name}", run.untrained)):
        row = {"name": name} | geometry(method, clouds, run.method.augmented)
        rows.append(row)
        print("  ".join(f"{key} {value}" for key, value in row.items()))
    write(out / "compare.json", json.dumps(rows, indent=1).replace("NaN", "null"))
    paths = turned_paths(run.method, clouds[0])
    draw_lines(out / "paths.png", {f"turned about {axis}": [points.T.tolist()]
                                   for axis, points in zip("xyz", paths)},
               "first principal component of the embeddings", "second", aspect="equal")
    print(f"{out} has compare.json and paths.png: the embeddings of a test cloud that is turned")

def main(argv=None):
    """Runs a command line: measures runs, writes a table, numbers and pictures."""
    parser = ArgumentParser("compare.py", description=__doc__.split("\n")[0], allow_abbrev=False)
    parser.add_argument("runs", nargs="+", metavar="RUN", help="folder of a finished run")
    parser.add_argument("--out", default="runs/compare",
                        help="folder for the table and the pictures (default: runs/compare)")
    parser.add_argument("--data-root", default="",
                        help="folder that holds the data (default: as in the runs)")
    parser.add_argument("--device", default="auto",
                        help="cpu, cuda or cuda:1 (default: cuda if there is one)")
    args = parser.parse_args(argv)
    out = Path(args.out).expanduser()
    try:
        # start reads and completes these two settings only
        device = start(simclr_essl.Config(device=args.device, precision="fp32"))
        runs = [load_run(folder, args.data_root, device) for folder in args.runs]
        check_alike(runs)
        first = runs[0]
        cells = first.script is photonics_reg
        clouds = first.config.dataset in care.CLOUDS
        if (cells or clouds) and len(runs) > 1:
            stop("runs on cells or clouds are measured one at a time")
        out.mkdir(parents=True, exist_ok=True)
        if cells:
            draw_spectra(out / "spectra.png", first, device)
            print(f"{out}/spectra.png: four test cells of {first.name}")
        elif clouds:
            compare_clouds(first, device, out)
        else:
            compare_images(runs, device, out)
    except KeyboardInterrupt:
        stop("stopped; the same command begins anew")
    except OSError as problem:  # a full disk, or a folder that cannot be written
        stop(f"{problem}: choose another --out")
    except RuntimeError as problem:
        if "out of memory" not in str(problem) and "allocate memory" not in str(problem):
            raise
        stop("memory is full: compare fewer runs at a time, or use --device cpu")

if __name__ == "__main__":
    main()
