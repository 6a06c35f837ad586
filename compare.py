"""What encoders know, side by side: finished runs of the scripts, measured by one protocol.

  python compare.py runs/A runs/B ...     image runs on one dataset
  python compare.py RUN                   one run; of photonics_reg.py: spectra, of proteins: paths

Writes a table (compare.md), all numbers (compare.json) and pictures to --out. Runs that differ in
their seed alone are one row of the table, mean±standard deviation. The protocol: up to 10,000
training images to learn from, 5,000 test images to score, in a fixed random order, float32 or TF32.
  accuracy   of features: kNN (k 200, T 0.1), and a linear probe on standardised features, its rate
             (of 0.01, 0.1, 1) chosen on a fifth of the training images.
  R^2        of the parameters of T, read from the frozen pair [f(x), f(T x)], one transformation
             at a time, always applied, drawn alike for all encoders: by ridge regression (penalty
             chosen on a fifth) and an MLP (512 hidden, AdamW 1e-3, 40 epochs). 1 - squares left /
             squares about the mean, for each parameter, then their mean (SIE pools the parameters).
             Crop: centre and log area; rotation: one of four turns.
  geometry   of embeddings on the sphere (features where there is no projector) under 10
             augmentations, each of all 2,000 test images alike. Wahba: the rotation (SO, or O with
             reflections) fitted on half of them, its error per image on the other half; none if
             the width D is more than that half. gamma_f of CARE, of 1,000 images: 0 for rotations.
             moved: mean distance. overlap: percent of five neighbours of 200 images that stay when
             the hue is shifted.
  layers     of homomorphic.py: relative error of equivariance, and that of doing nothing.
Neither R^2 nor geometry ranks encoders of different widths.
"""
import argparse
import importlib
import json
import math
import re
from copy import deepcopy
from dataclasses import replace
from itertools import cycle, pairwise
from pathlib import Path
from types import SimpleNamespace

import torch
import torch.nn.functional as F
from matplotlib import pyplot
from torchvision.ops import MLP
from torchvision.utils import save_image

import care
import photonics_reg
import simsiam_essl
from homomorphic import PLANES, SCALES, act, extract, transform
from sfrik import augment, blur, brightness, check, contrast, crop, draw_box, first_of
from sfrik import knn_accuracy, saturation, shift_hue, start

pyplot.rcParams.update({"backend": "Agg", "figure.autolayout": True, "savefig.dpi": 120})

FIT, SCORE, SHIFTED, DRAWS, RETRIEVED = 10_000, 5_000, 2_000, 10, 200
RANGES = {"flip": (0.0, 1.0), "hue": (-0.1, 0.1), "blur": (0.1, 2.0)}  # of the others 0.6 to 1.4
OPERATIONS = {"crop": lambda x, box: crop(x, box, x.shape[3]),
              "flip": lambda x, flipped: torch.where(flipped, x.flip(3), x),
              "rotation": lambda x, turns: transform(x, turns, "rotation"),
              "brightness": brightness, "contrast": contrast, "blur": blur,
              "saturation": saturation, "hue": shift_hue}
COLOUR = tuple(OPERATIONS)
GRAY = COLOUR[:6]  # those that change gray images

# %% RUNS ------------------------------------------------------------------------------------------
def load_run(folder, data_root, device):
    """Name, script, config, log, results, trained and untrained method of a finished run."""
    path = Path(folder)
    check((path / "results.json").is_file(), f"{folder} has no results.json of a finished run")
    try:
        saved = torch.load(path / "checkpoint.pt", map_location=device, weights_only=True)
        check(saved["script"] not in ("simclr_essl", "simsiam_essl", "care", "homomorphic"), f"{folder} "
              f"is a run of {saved['script']}.py, whose new form compare.py does not read yet")
        script = importlib.import_module(saved["script"])
        config = script.Config(**saved["config"])
        config = replace(config, data_root=data_root or config.data_root, precision="fp32")
        stage = (config.splits,) if script is photonics_reg else ()
        torch.manual_seed(config.seed)
        untrained = script.Method(config, *stage).to(device)
        method = deepcopy(untrained)
        method.load_state_dict(saved["method"])
    except Exception as problem:  # a damaged file, or one of another version, can raise anything
        check(False, f"cannot load the run in {folder} ({type(problem).__name__})")
    return SimpleNamespace(name=path.resolve().name, script=script, config=config, log=saved["log"],
                           method=method, untrained=untrained, classes=saved["data"].get("classes"))

def pick(images, n):
    """The first n images of a fixed random order: uint8 (n, C, S, S), also of a Folder."""
    rows = first_of(n, len(images))
    if isinstance(images, torch.Tensor):
        return images[rows.to(images.device)]
    return torch.stack([view for [view], _ in (images[0, row] for row in rows.tolist())])

def load_images(run, device):
    """(images, labels) to learn from and to score, read by the run's script, without its limits."""
    config = SimpleNamespace(**vars(run.config) | {"limit": 0, "validate": False})
    data = run.script.load_data(config, device)
    check(data[1], f"the data of {run.name} have no classes in train/ and val/ to compare by")
    return [(pick(images, n).to(device), pick(labels, n))
            for (images, labels), n in zip(data[1:], (FIT, SCORE))]

def embed(method, x, prepare=lambda x: x / 255 if x.dtype == torch.uint8 else x):
    """Embeddings (N, D) of images or clouds, on the sphere; features if there is no projector."""
    name = "embed" if hasattr(method, "embed") else "features"
    return F.normalize(extract(method, x, prepare, name))

# %% ACCURACY --------------------------------------------------------------------------------------
def standardised(fit, *others):
    """Rows less the mean of fit, over its standard deviation; constant columns become 0."""
    mean, std = fit.mean(0), fit.std(0)
    return [torch.where(std > 1e-6, (x - mean) / std.clamp(min=1e-6), 0) for x in (fit, *others)]

def accuracy(method, data):
    """kNN and linear accuracy, percent, of (images, labels) to learn from and to score."""
    (_, labels), (_, test_labels) = data
    features = [extract(method, images) for images, _ in data]
    k, classes = min(200, len(labels)), int(labels.max()) + 1
    knn = knn_accuracy(features[0], labels, features[1], test_labels, k, 0.1, classes)
    z, test = standardised(*features)
    held = len(z) // 5

    def probe(rows, x, y, rate, probes):
        torch.manual_seed(0)
        return simsiam_essl.linear_probe(lambda: z[rows], labels[rows], x, y, rate, epochs=50,
                                         probes=probes)[0]

    rates = (0.01, 0.1, 1.0)
    best = max(rates, key=lambda rate: probe(slice(held, None), z[:held], labels[:held], rate, 1))
    return {"knn": knn, "linear": probe(slice(None), test, test_labels, best, 5), "rate": best}

# %% TRANSFORMATIONS -------------------------------------------------------------------------------
def draw_transformation(name, n, size, seed=0):
    """Arguments (n, ...) of a transformation of n images, and its parameters (n, P)."""
    generator = torch.Generator().manual_seed(len(COLOUR) * seed + COLOUR.index(name))

    def uniform(low, high, *shape):
        return torch.empty(n, *shape).uniform_(low, high, generator=generator)

    if name == "crop":
        box = draw_box(uniform, size, size, (0.2, 1.0))
        top, left, height, width = box.T
        return box, torch.stack([top + height / 2, left + width / 2, (height * width).log()], 1)
    if name == "rotation":
        turns = torch.randint(4, (n,), generator=generator)
        return turns, F.one_hot(turns, 4).float()
    values = uniform(*RANGES.get(name, (0.6, 1.4)), 1, 1, 1)
    values = values < 0.5 if name == "flip" else values
    return values, values.float().flatten(1)

def transformed(name, x, argument):
    """Images (N, C, S, S) in [0, 1], transformed each by its argument."""
    return OPERATIONS[name](x.expand(-1, 3, -1, -1), argument)[:, :x.shape[1]]

def r2_score(prediction, target):
    """1 - squares left / squares about the mean, a mean over parameters; NaN if one is constant."""
    left = (prediction - target).square().sum(0)
    return (1 - left / (target - target.mean(0)).square().sum(0)).mean().item()

def ridge_r2(x, t, test, test_t):
    """R^2 of ridge regression from standardised rows (N, D) to standardised parameters (N, P)."""
    x, t, test, test_t = (y.double() for y in (x, t, test, test_t))
    held = len(x) // 5

    def predict(rows, penalty, queries):
        left = x[rows].T @ x[rows] + penalty * torch.eye(x.shape[1]).to(x)
        return queries @ torch.linalg.solve(left, x[rows].T @ t[rows])

    rest, penalties = slice(held, None), (1.0, 10.0, 100.0, 1e3, 1e4)
    best = max(penalties, key=lambda p: r2_score(predict(rest, p, x[:held]), t[:held]))
    return r2_score(predict(slice(None), best, test), test_t)

def mlp_r2(x, t, test, test_t):
    """R^2 of an MLP with one hidden layer, from and to the same."""
    torch.manual_seed(0)
    mlp = MLP(x.shape[1], [512, t.shape[1]]).to(x.device)
    optimizer = torch.optim.AdamW(mlp.parameters(), 1e-3, weight_decay=1e-2)
    for _ in range(40):
        for rows in torch.randperm(len(x), device=x.device).split(256):
            loss = F.mse_loss(mlp(x[rows]), t[rows])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    with torch.no_grad():
        return r2_score(mlp(test), test_t)

def what_is_known(method, fit, score):
    """R^2 by both readouts of every transformation of images (N, C, S, S) to fit and to score."""
    known, plain = {}, [extract(method, x) for x in (fit, score)]
    for name in COLOUR if fit.shape[1] == 3 else GRAY:
        pairs, parameters = [], []
        for seed, (images, z) in enumerate(zip((fit, score), plain)):
            argument, parameter = draw_transformation(name, len(images), images.shape[3], seed)
            remaining = iter(argument.to(images.device).split(256))
            after = extract(method, images, lambda x: transformed(name, x / 255, next(remaining)))
            pairs.append(torch.cat([z, after], dim=1))
            parameters.append(parameter.to(images.device))
        (x, test), (t, test_t) = standardised(*pairs), standardised(*parameters)
        known[name] = {"ridge": ridge_r2(x, t, test, test_t), "mlp": mlp_r2(x, t, test, test_t)}
    return known

# %% GEOMETRY --------------------------------------------------------------------------------------
def wahba_rotation(f, f_a, reflections=False):
    """The rotation R (D, D), float64, with f_a nearest to f R^T, both (N, D): Wahba's problem.

    Section 4 of the paper, by the singular value decomposition; with reflections, R in O(D).
    """
    u, _, vt = torch.linalg.svd(f_a.double().T @ f.double())
    if not reflections:
        u[:, -1] *= torch.det(u @ vt).sign()
    return u @ vt

def wahba_error(f, f_a, reflections=False, fit=None):
    """Frobenius norm of f R^T - f_a, both (N, D), for the R that is best for them, or for fit."""
    rotation = wahba_rotation(*(fit or (f, f_a)), reflections)
    return torch.linalg.norm(f.double() @ rotation.T - f_a.double()).item()

def relative_equivariance(f, f_a):
    """gamma_f of section 5.2 for one augmentation, of embeddings before and after it, (N, D).

    Mean over pairs of the squared change of their squared distance, over the squared sum of what
    the two moved. 0 for a rotation; pairs that did not move are left out, nan if none did.
    """
    f, f_a = f.double(), f_a.double()
    change = F.pdist(f_a).square() - F.pdist(f).square()  # of all pairs i < j
    moved = (f_a - f).square().sum(1)
    both = torch.combinations(moved).sum(1).square()
    pairs = both >= 1e-12
    return (change.square()[pairs] / both[pairs]).mean().item()

def geometry(method, images, change, draws):
    """What augmentations, each applied to all images alike, do to embeddings: means over draws.

    change(x, share): x augmented, so many consecutive images alike. What is undefined is None.
    """
    z, rows = embed(method, images), []
    for seed in range(draws):
        def alike(x):
            torch.manual_seed(seed)  # the same augmentation for every part, and for every encoder
            return change(x, len(x))

        z_a = embed(method, images, alike)
        fit, rest = zip(z.chunk(2), z_a.chunk(2))  # before and after, of half of the images each
        errors = [math.nan, math.nan]
        if z.shape[1] <= len(fit[0]):
            errors = [wahba_error(*rest, free, fit) / len(rest[0]) ** 0.5 for free in (False, True)]
        rows.append([*errors, relative_equivariance(z[:1000], z_a[:1000]),
                     (z - z_a).norm(dim=1).mean().item()])
    means = torch.tensor(rows, dtype=torch.float64).mean(0).tolist()
    names = ("wahba_so", "wahba_o", "gamma_f", "moved")
    measured = {name: mean if math.isfinite(mean) else None for name, mean in zip(names, means)}
    return measured | {"width": z.shape[1], "images": len(z), "draws": draws}

def mean_hue(images):
    """Hue, in turns, of the mean colour of images (N, 3, H, W)."""
    red, green, blue = images.mean((2, 3)).T
    return torch.atan2(3 ** 0.5 * (green - blue), 2 * red - green - blue) / (2 * math.pi)

def retrieve(method, bank, queries):
    """The nearest images of queries, and of the same with another hue (CARE, section 5.3).

    bank, queries: uint8 (N, 3, S, S). Ours: overlap_at_5, percent of the five nearest that stay
    when the hue is shifted by 0.1 to 0.5 turns either way; hue_difference, mean hue distance, in
    degrees, of those found for the recoloured image to it (chance: 90). Also rows of the bank
    (M, 5) that are nearest before and after, and the recoloured queries.
    """
    shift = torch.linspace(0.1, 0.9, len(queries), device=queries.device)[:, None, None, None]
    recoloured = shift_hue(queries.float() / 255, shift)
    known = embed(method, bank)
    before = (embed(method, queries) @ known.T).topk(5).indices
    after = (embed(method, recoloured) @ known.T).topk(5).indices
    overlap = 100 * (before[:, :, None] == after[:, None]).any(2).float().mean().item()
    found = mean_hue(bank[after.flatten()].float() / 255).view_as(after)
    off = (found - mean_hue(recoloured)[:, None] + 0.5).remainder(1) - 0.5
    measured = {"overlap_at_5": overlap, "hue_difference": 360 * off.abs().mean().item()}
    return measured, before, after, recoloured

def positive_cosines(method, images, change):
    """Cosines (N,) of two augmented views of each image, by change(x, share)."""
    torch.manual_seed(0)
    z1, z2 = (embed(method, images, lambda x: change(x, 1)) for _ in range(2))
    return (z1 * z2).sum(1)

def layer_errors(method, images):
    """For every layer of a GroupEncoder |act(f(x), g) - f(T_g x)| / |f(T_g x)|, Frobenius norms.

    rotation: a quarter turn, the whole map. translation: by the product of all strides in both
    directions; scale: the mean over neighbouring planes. Both in the inner half of the map. Second,
    what leaving f(x) as it is would give: with the same plane, place and orientation. In eval mode
    and float64: on a GPU, TF32 would hide that rotation is exact.
    """
    group, strides = method.config.group, method.encoder.strides
    layers, mean, std = deepcopy(method.encoder.layers).double().eval(), method.mean, method.std
    x, stride = method.canvas(images.double() / 255), math.prod(strides)
    elements = {"rotation": [1], "translation": [torch.full((len(x), 2), stride, device=x.device)],
                "scale": [*pairwise(range(len(SCALES)))]}[group]
    errors, unmoved = torch.zeros(2, len(layers))
    for g in elements:
        factor = SCALES[g[1]] / SCALES[g[0]] if group == "scale" else g
        maps = (torch.cat([x, transform(x, factor, group)]) - mean) / std
        for depth, layer in enumerate(layers):
            maps = layer(maps)
            z, w = maps.reshape(2, len(x), -1, PLANES[group], *maps.shape[-2:])
            if group == "rotation":
                moved, known = act(z, g, group), torch.ones_like(z)
            else:
                cells = g // math.prod(strides[:depth + 1]) if group == "translation" else g
                moved, known = act(z, cells, group)
                rows, columns = (slice(side // 4, side - side // 4) for side in z.shape[3:])
                z, w, moved, known = (y[..., rows, columns] for y in (z, w, moved, known))
            size = (w * known).norm()
            errors[depth] += ((moved - w) * known).norm().item() / size.item()
            unmoved[depth] += ((z - w) * known).norm().item() / size.item()
    return (errors / len(elements)).tolist(), (unmoved / len(elements)).tolist()

def turned_paths(method, cloud):
    """Embeddings of a cloud (P, 4) turned by 0 to 360 degrees about x, y and z: (3, 101, 2).

    In the first two principal components of all three paths; the paper's ideal is a circle each.
    """
    angle = torch.linspace(0, 2 * math.pi, 101, device=cloud.device)[:, None, None]
    axes = torch.eye(3, device=cloud.device)
    spins = torch.linalg.cross(axes[None], axes[:, None])  # of shape (3, 3, 3)
    turns = torch.matrix_exp(angle * spins[:, None]).flatten(0, 1)  # (303, 3, 3)
    z = embed(method, care.rotate(cloud.expand(303, -1, -1), turns))
    z = z - z.mean(0)
    return (z @ torch.linalg.svd(z, full_matrices=False).Vh[:2].T).view(3, 101, 2).cpu()

# %% PICTURES --------------------------------------------------------------------------------------
COLORS, DASHES = ("black", "tab:blue", "tab:orange", "tab:green", "tab:red"), ("-", "--", ":", "-.")
STYLES = [*zip(4 * COLORS, 5 * DASHES)]

def draw_curves(path, groups):
    """Loss and, where it was measured, kNN accuracy over epochs, {name: runs}."""
    figure, axes = pyplot.subplots(1, 2, figsize=(10, 4))
    for (name, runs), (color, dash) in zip(groups.items(), cycle(STYLES)):
        axes[0].plot([], [], dash, color=color, label=name)
        for run in runs:
            for axis, key in zip(axes, ("loss", "knn_top1")):
                points = [(line["epoch"], line[key]) for line in run.log if key in line]
                axis.plot(*zip(*points) if points else ([], []), dash, color=color)
    for axis, label in zip(axes, ("loss (each method its own)", "kNN accuracy, percent")):
        axis.set(xlabel="epoch", ylabel=label)
    axes[0].legend(fontsize=7, ncols=3, loc="lower left", bbox_to_anchor=(0.0, 1.0))
    figure.savefig(path)

def draw_r2(path, rows):
    """Grouped bars of R^2 by the MLP, and of ridge regression as a line across each bar.

    rows: as over_seeds returns them; a bar's whisker is the standard deviation over seeds.
    """
    names = [*rows[0]["r2"]]
    figure, axis = pyplot.subplots(figsize=(10, 4))
    width, shades = 0.8 / len(rows), pyplot.cm.viridis(torch.linspace(0, 0.9, len(rows)).tolist())
    for i, (row, shade) in enumerate(zip(rows, shades)):
        x = [place - 0.4 + (i + 0.5) * width for place in range(len(names))]
        mlp, ridge = ([row["r2"][name][key] for name in names] for key in ("mlp", "ridge"))
        axis.bar(x, [max(0, mean) for mean, _ in mlp], width, yerr=[std for _, std in mlp],
                 color=shade, edgecolor="black", linewidth=0.5, label=row["name"])
        axis.errorbar(x, [max(0, r2) for r2, _ in ridge], xerr=width / 2, fmt="none", ecolor="r")
    axis.set_xticks(range(len(names)), names)
    axis.set(ylim=(0, 1), ylabel="R^2 of the parameters of T in [f(x), f(T x)]\n"
                                 "(bar: MLP, red line: ridge; < 0 as 0)")
    axis.legend(fontsize=7, ncols=4, loc="lower center", bbox_to_anchor=(0.5, 1.0))
    figure.savefig(path)

def draw_cosines(path, cosines):
    """Histograms of the cosine of two views of an image, {name: (N,)}."""
    figure, axis = pyplot.subplots(figsize=(7, 4))
    for (name, values), (color, dash) in zip(cosines.items(), cycle(STYLES)):
        counts, edges = torch.histogram(values.clamp(-1, 1).cpu(), 40, range=(-1.0, 1.0))
        axis.stairs((100 * counts / len(values)).tolist(), edges.tolist(), color=color,
                    linestyle=dash, label=name)
    axis.set(xlabel="cosine of the embeddings of two views of a test image (one seed)",
             ylabel="percent of images")
    axis.legend(fontsize=7)
    figure.savefig(path)

def draw_retrieval(path, bank, queries, before, after, recoloured):
    """Five queries with their five nearest images and, below, the same recoloured."""
    shown = torch.linspace(0, len(queries) - 1, 5).long().tolist()
    rows = [torch.cat([image[i:i + 1], bank[near[i]] / 255]).cpu() for i in shown
            for image, near in ((queries / 255, before), (recoloured, after))]
    tiles = F.interpolate(torch.cat(rows), scale_factor=2)
    save_image(tiles, path, nrow=6, padding=4, pad_value=1.0)

def draw_paths(path, paths):
    """Paths (3, 101, 2) of a turned cloud's embeddings, to equal scale."""
    figure, axis = pyplot.subplots(figsize=(5, 5))
    for name, dash, points in zip("xyz", ("-", "--", ":"), paths):
        axis.plot(*points.T.tolist(), f"k{dash}", label=f"turned about {name}")
    axis.set(aspect="equal", xlabel="first principal component",
             ylabel="second principal component")
    axis.legend()
    figure.savefig(path)

def draw_spectra(path, run, device):
    """Four test cells, from weak to strong contrast, with true and predicted density of states."""
    cells, labels = run.script.load_data(run.config, device)[0][2]
    ratio = cells.amax((1, 2)) / cells.amin((1, 2))
    rows = ratio.argsort()[[len(cells) * share // 20 for share in (7, 11, 15, 19)]]
    predicted = run.script.predict(run.method, cells[rows])
    figure, axes = pyplot.subplots(4, 2, figsize=(8, 9), width_ratios=(1, 3))
    x = [i * photonics_reg.STEP for i in range(photonics_reg.POINTS)]
    for (left, right), cell, true, guess in zip(axes, cells[rows], labels[rows], predicted):
        left.imshow(cell.T.tolist(), cmap="gray_r", origin="lower")
        left.set_title(f"permittivity {cell.min():.1f} and {cell.max():.1f}", fontsize=8)
        left.set_axis_off()
        right.axline((0, 0), slope=2 * math.pi, ls=":", color="gray", label="empty lattice, 2 pi x")
        right.plot(x, true.tolist(), "k-", label="solved")
        right.plot(x, guess.tolist(), "--", color="tab:red", label="predicted")
        right.set_ylabel("states per cell and x", fontsize=8)
    axes[0][1].legend(fontsize=8)
    axes[-1][1].set_xlabel("x: frequency times the root of the mean permittivity, in 2 pi c / a")
    figure.savefig(path)

# %% MAIN ------------------------------------------------------------------------------------------
def measure(name, method, data, change):
    """All numbers of one encoder."""
    print(f"measuring {name}", flush=True)
    (fit, _), (score, _) = data
    row = {"name": name, "r2": what_is_known(method, fit, score),
           "geometry": geometry(method, score[:SHIFTED], change, DRAWS)} | accuracy(method, data)
    if fit.shape[1] == 3:
        row["geometry"] |= retrieve(method, fit, score[:RETRIEVED])[0]
    if hasattr(method.encoder, "strides"):
        row["layers"], row["layers_unmoved"] = layer_errors(method, score[:64])
    return row

def over_seeds(values):
    """Rows of measure as one: (mean, standard deviation) of numbers, None if one is undefined."""
    if isinstance(values[0], dict):
        return {key: over_seeds([value[key] for value in values]) for key in values[0]}
    if isinstance(values[0], list):
        return [over_seeds(column) for column in zip(*values)]
    if isinstance(values[0], str):
        return re.sub("-?seed=?[0-9]+", "", values[0]) if len(values) > 1 else values[0]
    if None in values:
        return None
    spread = torch.tensor(values, dtype=torch.float64)
    return spread.mean().item(), spread.std(correction=0).item()

def table(rows):
    """Blocks of text, at most 120 columns wide, of rows as over_seeds returns them."""
    def number(pair, digits):
        if pair is None:
            return "-"
        return "±".join(f"{x:z.{digits}f}" for x in (pair if pair[1] else pair[:1]))

    def line(name, values):
        flags = "-".join(flag for flag in name.split("-") if flag not in shared) or name
        flags = f"{flags[:10]}...{flags[-17:]}" if len(flags) > 30 else flags
        return f"{flags:30}" + "".join(f" {value:>9}" for value in values)

    def block(title, heads, values):
        return [title, line("", heads), *(line(row["name"], values(row)) for row in rows), ""]

    shared = set.intersection(*(set(row["name"].split("-")) for row in rows))
    columns = {"kNN": ("knn", 1), "linear": ("linear", 1), "overlap": ("overlap_at_5", 1),
               "Wahba SO": ("wahba_so", 2), "Wahba O": ("wahba_o", 2), "gamma_f": ("gamma_f", 2),
               "moved": ("moved", 2), "D": ("width", 0)}
    lines = block("accuracy, percent, and geometry", columns, lambda row: [
        number((row | row["geometry"]).get(key), digits) for key, digits in columns.values()])
    for readout in ("mlp", "ridge"):
        lines += block(f"R^2 of the parameters of a transformation, by {readout}", rows[0]["r2"],
                       lambda row: [number(r2[readout], 2) for r2 in row["r2"].values()])
    for row in rows:
        if "layers" in row:
            both = zip(row["layers"], row["layers_unmoved"])
            lines += [f"{row['name']}: equivariance error of each layer (of doing nothing)",
                      " ".join(f"{error:.2g} ({nothing:.2g})" for (error, _), (nothing, _) in both)]
    return "\n".join(lines)

def main(argv=None):
    """Runs a command line; exit code 2 for what cannot be compared."""
    parser = argparse.ArgumentParser("compare.py", description=__doc__.split("\n")[0])
    parser.error = lambda message: check(False, f"{message} (see --help)")
    parser.add_argument("runs", nargs="+", metavar="RUN", help="folder of a finished run")
    parser.add_argument("--out", default="runs/compare", help="folder for table and pictures")
    parser.add_argument("--data-root", default="", help="where the data are [as in the runs]")
    parser.add_argument("--device", default="auto", help="cpu, cuda, cuda:1 [cuda if there is one]")
    args = parser.parse_args(argv)
    device, out = start(args), Path(args.out)
    runs = [load_run(folder, args.data_root, device) for folder in args.runs]
    first = runs[0]
    streamed = lambda run: isinstance(run.classes, list)  # the names of class folders
    kind = lambda run: (run.config.dataset, getattr(run.config, "size", 32), run.classes,
                        streamed(run) and Path(run.config.data_root).resolve())
    check(len({run.name for run in runs}) == len(runs), "two runs have the same folder name")
    check(all(kind(run) == kind(first) for run in runs), "these runs are of different data or "
          "sizes: " + ", ".join(f"{run.name} {kind(run)[:2]}" for run in runs))
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as problem:
        check(False, f"cannot write to {out} ({problem}): choose another --out")
    clouds = first.config.dataset in getattr(first.script, "CLOUDS", ())
    alone = first.script is photonics_reg or clouds
    check(not alone or len(runs) == 1, "runs on cells or clouds are measured one at a time")
    if first.script is photonics_reg:
        draw_spectra(out / "spectra.png", first, device)
        print(f"{out}/spectra.png: four test cells of {first.name}")
        return
    if alone:
        *_, (clouds, _) = first.script.load_data(first.config, device)
        rotated = lambda x, share: first.method.augmented(x, share)
        rows = [{"name": name} | geometry(method, clouds[:SHIFTED], rotated, DRAWS)
                for name, method in ((first.name, first.method), ("untrained", first.untrained))]
        draw_paths(out / "paths.png", turned_paths(first.method, clouds[0]))
        (out / "compare.json").write_text(json.dumps(rows, indent=1))
        print(*(json.dumps(row) for row in rows), f"{out}/paths.png", sep="\n")
        return

    data = load_images(first, device)
    (fit, _), (score, _) = data
    size = fit.shape[3]
    change = lambda x, share: augment(x.expand(-1, 3, -1, -1), size, share=share)[:, :x.shape[1]]
    groups, untrained = {}, {}
    for run in runs:
        flags = {k: v for k, v in vars(run.config).items() if k not in ("seed", *run.script.FREE)}
        groups.setdefault((run.script.SCRIPT, *flags.items()), []).append(run)
        weights = (*run.untrained.encoder.parameters(), run.untrained.mean_std)
        untrained.setdefault(sum(x.double().sum().item() for x in weights), run)  # each once
    encoders = [[(run.name, run.method) for run in group] for group in groups.values()]
    for group in groups.values():
        encoders.append([(f"untrained, as {run.name}", run.untrained) for run in group
                         if run in untrained.values()])
    rows = [[measure(*encoder, data, change) for encoder in group] for group in encoders if group]
    means = [over_seeds(group) for group in rows]
    groups = {row["name"]: group for row, group in zip(means, groups.values())}
    text = table(means)
    (out / "compare.md").write_text(f"```\n{text}\n```\n")
    (out / "compare.json").write_text(json.dumps({
        "protocol": __doc__, "fit": len(fit), "score": len(score), "device": str(device),
        "torch": str(torch.__version__), "configs": {run.name: vars(run.config) for run in runs},
        "means": means, "rows": sum(rows, [])}, indent=1))
    draw_curves(out / "curves.png", groups)
    draw_r2(out / "r2.png", means)
    draw_cosines(out / "cosines.png", {
        name: positive_cosines(group[0].method, score[:SHIFTED], change)
        for name, group in groups.items()})
    if fit.shape[1] == 3:
        _, *found = retrieve(first.method, fit, score[:RETRIEVED])
        draw_retrieval(out / "retrieval.png", fit, score[:RETRIEVED], *found)
    print(f"{text}\n\n{out}: compare.md, compare.json and pictures, retrieval of {first.name}")

if __name__ == "__main__":
    main()
