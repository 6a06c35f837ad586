"""E-SSL for photonic crystals: learns the density of states of a unit cell from few labels.

R. Dangovski, L. Jing, C. Loh, S. Han, A. Srivastava, B. Cheung, P. Agrawal, M. Soljacic,
"Equivariant Contrastive Learning" (E-SSL), ICLR 2022, arXiv:2111.00899, photonics experiment.

A photonic crystal, here in two dimensions, repeats a unit cell of two materials, with a mirror axis
(--dataset gpm) or one inclusion in its center (blob). Its density of states (DOS), the number of
TM light modes near each frequency, takes hundreds of eigenvalue problems; an image of a cell costs
nothing. So an encoder is first trained on images alone. SimCLR makes it invariant to changes that
leave the DOS as it is (gpm: shifts and mirrors; blob: mirrors and turns). E-SimCLR, --mode essl,
adds a head that predicts another such change (gpm: turns; blob: shifts): the features stay
sensitive to it, though the DOS is not. Then a few labelled cells teach the encoder the DOS.

Algorithm for a batch of N cells, encoder f, projector p1, predictor p2, regressor h:
  1. draw two views of every cell; loss_invariance = NT-Xent between the two p1(f(view));
  2. v = every cell itself, not a view of it, in four versions: turned by 0, 90, 180 and 270 degrees
     (gpm), or shifted by half a cell along no axis, y, x and both (blob);
  3. loss_equivariance = cross-entropy of p2(f(v)) against the class of the version: for blob its
     shift; for gpm whether the mirror axis was turned, by 90 or 270 degrees ([C]: which turn);
  4. step f, p1 and p2 on loss_invariance + alpha * loss_equivariance.
  5. Afterwards, with one view of every cell of a labelled batch: step f and h, or with --frozen h
     alone, on the mean squared difference between h(f(view)) + 2 pi x and the DOS. x is the
     frequency times the root of the mean permittivity; homogeneous cells have the DOS 2 pi x.
  --mode supervised is step 5 alone. simclr leaves steps 2 and 3 out; so does simclr+transform, but
  it also turns (gpm) or shifts (blob) every view, in step 5 too, at random, as step 2 does.

Usage
  python photonics_reg.py --quick                the four modes, two minutes on a CPU
  python photonics_reg.py --mode all             the four modes at full scale, on one GPU; first the
                                                 labels, once: half an hour of one CPU core
  python photonics_reg.py --mode all --frozen --pretrained "runs/photonics_reg-mode=all"  trains h

Differences from paper [P] and authors' code [C] that change numbers (more: results/README.md):
  - Cells and labels are our own ([C]: files made with MPB and MATLAB). The shape of blob's centered
    inclusion is ours: its generator is not published. Our mirror axis lies between pixels.
  - Bins of the DOS count states exactly ([C]'s data: the density at their centers), smoothed by a
    Gaussian whose width is fixed in x ([C]'s data: it follows the cell's highest frequency).
  - As in [C], the fine-tuning's loss is a squared error ([P], --absolute: an absolute one), and the
    test error leaves out x below 0.24 ([P]: nothing).
  - The error is the last epoch's ([C]: the lowest of all, from encoders of epochs 100 and 200).
  - A split trains on a random 6/7 of one pool and validates on the rest ([C]: no validation).
  - On a GPU the encoder runs in bfloat16 and matrix products in TF32.
"""
import io
import json
import math
import os
import sys
import time
from argparse import SUPPRESS, ArgumentParser
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field, fields, replace
from datetime import timedelta
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F
import torchvision.transforms.functional as TF
from PIL import ImageOps
from torchvision.utils import save_image

SCRIPT = "photonics_reg"

# %% CONFIG ----------------------------------------------------------------------------------------
def option(default, explanation, choices=""):
    """A field of Config; parse_args passes its metadata to add_argument."""
    if default is False:
        flag = {"action": "store_true", "help": explanation}
    else:
        flag = {"type": type(default), "help": f"{explanation} (default: {default})"}
    if choices:
        flag["choices"] = choices.split()
    return field(default=default, metadata=flag)

@dataclass
class Config:
    """The settings of the authors' code for gpm. PRESETS has what blob changes."""
    dataset: str = option("gpm", "cells (gpm: plane group pm, one mirror; blob: one inclusion)",
                          "gpm blob")
    data_root: str = option("data", "folder in which computed labels are kept")
    limit: int = option(3000, "labelled cells of a split to train on (plus a sixth for validation)")
    unlabelled: int = option(20480, "cells of the pre-training")
    test: int = option(2000, "labelled cells to test on")
    cutoff: int = option(4, "labels are computed from (2 cutoff + 1)^2 plane waves")
    mode: str = option("essl", "how to train (all: the four others, each in its folder)",
                       "supervised simclr simclr+transform essl all")
    alpha: float = option(5.0, "weight of the equivariance loss")
    temperature: float = option(0.1, "temperature of NT-Xent")
    splits: int = option(3, "labelled splits; the encoder is fine-tuned on each anew")
    absolute: bool = option(False, "fine-tune on absolute errors, not on squared ones")
    frozen: bool = option(False, "do not train the encoder in the fine-tuning (BatchNorm's "
                                 "statistics still adapt)")
    pretrained: str = option("", "folder of a run whose encoder to fine-tune (empty: train one)")
    arch: str = option("paper", "size of the networks", "paper small")
    epochs: int = option(200, "passes over the unlabelled cells")
    batch_size: int = option(256, "cells per step of the pre-training")
    lr: float = option(1e-3, "peak learning rate of the pre-training, not scaled by the batch")
    tune_epochs: int = option(100, "passes over the labelled cells of a split")
    tune_batch_size: int = option(64, "cells per step of the fine-tuning")
    tune_lr: float = option(1e-4, "learning rate of the fine-tuning, which is constant")
    tune_weight_decay: float = option(1e-5, "weight decay of the fine-tuning")
    seed: int = option(0, "random seed of the weights, the batches and the views, not of the cells")
    eval_every: int = option(1, "epochs of fine-tuning between tests (the last is always tested)")
    save_every: float = option(5.0, "minutes between checkpoints, written when an epoch ends")
    device: str = option("auto", "cpu, cuda or cuda:1 (auto: cuda if there is one)")
    precision: str = option("auto", "precision of the encoder (auto: bf16 if the GPU has it)",
                            "auto bf16 fp32")
    compile: bool = option(False, "use torch.compile")
    out: str = option("", "folder for the results (empty: in runs/, named after the flags)")
    quick: bool = option(False, "few cells, small networks, all modes: two minutes on a CPU")

PRESETS = {"blob": dict(unlabelled=15000, test=1999)}  # authors' code
QUICK = dict(mode="all", arch="small", epochs=10, batch_size=64, lr=0.01, tune_epochs=60,
             tune_lr=1e-3, limit=180, unlabelled=1024, test=90, splits=1, cutoff=3, eval_every=10)
# what may change when a run is continued
FREE = ("data_root", "out", "device", "compile", "save_every", "eval_every")
MODES = ("supervised", "simclr", "simclr+transform", "essl")
SIDE = 32  # pixels of a cell's side
POINTS, X_STEP = 400, 1.2 / 499  # labels: the DOS at x = 0, X_STEP, ..., 399 X_STEP, near 0.96

def stop(message):
    """Ends the program with one line."""
    raise SystemExit(f"error: {message}")

# %% METHOD ----------------------------------------------------------------------------------------
# The views and versions of cells are defined in AUGMENT, the networks in MODEL.
def nt_xent(z1, z2, temperature):
    """NT-Xent, SimCLR's InfoNCE, of the embeddings (N, D) of two views, by cosine similarity.

    Each of the 2N rows must find the other view of its image among all rows but itself.
    """
    z = F.normalize(torch.cat([z1, z2]))
    similarity = z @ z.T / temperature  # (2N, 2N)
    itself = torch.eye(len(z), dtype=torch.bool, device=z.device)
    similarity = similarity.masked_fill(itself, -torch.inf)
    other_view = torch.arange(len(z), device=z.device).roll(len(z1))  # N, ..., 2N-1, 0, ..., N-1
    return F.cross_entropy(similarity, other_view)

def empty_lattice(device):
    """The DOS (400,) of a homogeneous cell: 2 pi x, at the x of the labels."""
    return 2 * math.pi * torch.arange(POINTS, device=device) * X_STEP

class Method(nn.Module):
    """One stage: the pre-training (split 0), or the fine-tuning on labelled split 1, 2, ...

    Cells are permittivities (N, 32, 32), labels their DOS (N, 400); the pre-training needs none.
    """

    def __init__(self, config, split=0):
        super().__init__()
        self.config, self.split = config, split
        widths = ARCHS[config.arch]
        self.encoder = make_cell_encoder(widths)
        self.projector = self.predictor = self.regressor = None
        if split > 0:
            self.regressor = make_regressor(widths)
            self.encoder.requires_grad_(not config.frozen)
        else:
            self.projector = make_head(widths, widths["embedding"])
            if config.mode == "essl":
                classes = 2 if config.dataset == "gpm" else 4
                self.predictor = make_head(widths, classes)

    def forward(self, cells, labels=None):
        if self.split > 0:
            return self.fine_tune(cells, labels)
        return self.pretrain(cells)

    def pretrain(self, cells):
        """Steps 1 to 3 of the algorithm: the loss that step 4 takes, and terms for the log."""
        config = self.config
        f, p1, p2 = self.features, self.projector, self.predictor
        view1, view2 = self.views(cells)
        z1 = p1(f(view1))  # (N, D)
        z2 = p1(f(view2))
        loss_invariance = nt_xent(z1, z2, config.temperature)
        terms = {"invariance": loss_invariance, "std": spread(z1)}
        if config.mode != "essl":
            return loss_invariance, terms

        v, target = versions(cells, config.dataset)  # (4N, 32, 32), classes (4N,)
        logits = p2(f(v))  # (4N, 2), or (4N, 4) for blob
        loss_equivariance = F.cross_entropy(logits, target)
        terms["equivariance"] = loss_equivariance
        terms["transform_top1"] = 100 * (logits.argmax(1) == target).float().mean()
        return loss_invariance + config.alpha * loss_equivariance, terms

    def fine_tune(self, cells, labels):
        """The loss of step 5 of the algorithm, and no terms."""
        prediction = self.predict_dos(random_views(cells, self.config))
        if self.config.absolute:
            return F.l1_loss(prediction, labels), {}
        return F.mse_loss(prediction, labels), {}

    def views(self, cells):
        """Two random views of every cell."""
        return random_views(cells, self.config), random_views(cells, self.config)

    def features(self, cells):
        """Features (N, D), float32, of cells."""
        bf16 = self.config.precision == "bf16"
        with torch.autocast(cells.device.type, torch.bfloat16, enabled=bf16):
            return self.encoder(to_images(cells)).float()

    def predict_dos(self, cells):
        """The predicted DOS (N, 400) of cells: h(f(cells)) + 2 pi x."""
        return self.regressor(self.features(cells)) + empty_lattice(cells.device)

def to_images(cells):
    """Permittivities (N, 32, 32), 1 to 20, as images (N, 1, 32, 32) in [0, 1]."""
    return (cells[:, None] - 1) / 19

def spread(z):
    """Standard deviation of the normalised embeddings (N, D) times sqrt(D).

    1 if they are spread evenly over the sphere, 0 if they collapse.
    """
    return F.normalize(z.detach()).std(0).mean() * z.shape[1] ** 0.5

# %% AUGMENT ---------------------------------------------------------------------------------------
def random_views(cells, config):
    """A random view of every cell, of the same DOS; simclr+transform: also in a random version."""
    transformed = config.mode == "simclr+transform"
    draws = draw_symmetries(len(cells), config.dataset, transformed, cells.device)
    return apply_symmetries(cells, *draws)

def draw_symmetries(n, kind, transformed, device):
    """Mirrors (n,), turns (n,) and shifts (n, 2) of n views, for apply_symmetries.

    gpm: no mirror or one of two, and any shift. blob: the same mirrors, and any turn. gpm's turns
    and blob's shifts by half a cell, which E-SimCLR predicts, are 0 unless transformed.
    """
    mirror = torch.randint(3, (n,), device=device)
    turn = torch.randint(4, (n,), device=device)
    shift = torch.randint(SIDE, (n, 2), device=device)
    if kind == "gpm":
        turn = turn * transformed  # 0 unless transformed
    else:
        half = SIDE // 2
        shift = shift // half * half * transformed  # 0 or half a cell; 0 unless transformed
    return mirror, turn, shift

def apply_symmetries(cells, mirror, turn, shift):
    """Cells (N, 32, 32) mirrored (0: no, 1: x -> -x, 2: y -> -y), then turned, then shifted.

    turn (N,) counts turns by 90 degrees, shift (N, 2) pixels along x and y.
    """
    i = torch.arange(len(cells), device=cells.device)
    mirrored = torch.stack([cells, cells.flip(1), cells.flip(2)])  # (3, N, 32, 32)
    cells = mirrored[mirror, i]  # (N, 32, 32): of cell i the version mirror[i]
    turned = torch.stack([cells.rot90(k, (1, 2)) for k in range(4)])  # (4, N, 32, 32)
    cells = turned[turn, i]
    # row p of a shifted cell is row p - shift of the cell, modulo 32; columns alike
    p = torch.arange(SIDE, device=cells.device)
    rows = (p - shift[:, :1]) % SIDE  # (N, 32)
    columns = (p - shift[:, 1:]) % SIDE
    return cells[i[:, None, None], rows[:, :, None], columns[:, None, :]]  # broadcast: (N, 32, 32)

def versions(cells, kind):
    """All cells in the first version, all in the second, ...: (4N, 32, 32), and classes (4N,).

    gpm: turned by 0, 90, 180 and 270 degrees; class 1 if the turn, by 90 or 270,
    moves the mirror axis.
    blob: shifted by (0, 0), (0, 1), (1, 0) and (1, 1) half cells, each a class.
    """
    version = torch.arange(4, device=cells.device).repeat_interleave(len(cells))
    if kind == "gpm":
        return torch.cat([cells.rot90(k, (1, 2)) for k in range(4)]), version % 2
    half = (0, SIDE // 2)
    return torch.cat([cells.roll((x, y), (1, 2)) for x in half for y in half]), version

# %% MODEL -----------------------------------------------------------------------------------------
# widths: features are outputs of f; hidden layers are those of p1 and p2, embeddings outputs of p1
ARCHS = {
    "paper": dict(channels=(64, 256, 256), features=1024, hidden=512, embedding=256,
                  regressor=(1024, 1024, 512)),
    "small": dict(channels=(16, 32, 64), features=256, hidden=128, embedding=64,
                  regressor=(256, 256, 256)),
}

def make_cell_encoder(widths):
    """f: three 7x7 convolutions and two linear layers, (N, 1, 32, 32) -> (N, features)."""
    layers, inputs = [], 1
    for outputs, pool in zip(widths["channels"], (2, 4, 4)):  # 32 pixels become 16, 4 and 1
        layers += [nn.Conv2d(inputs, outputs, 7, padding=3), nn.BatchNorm2d(outputs), nn.ReLU(),
                   nn.MaxPool2d(pool)]
        inputs = outputs
    features = widths["features"]
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(inputs, features), nn.ReLU(),
                         nn.Linear(features, features))

def make_head(widths, outputs):
    """p1 or p2: (N, features) -> (N, outputs). As in [C], its hidden layers share one BatchNorm."""
    inputs, hidden = widths["features"], widths["hidden"]
    norm = nn.BatchNorm1d(hidden)
    return nn.Sequential(nn.Linear(inputs, hidden), norm, nn.ReLU(),
                         nn.Linear(hidden, hidden), norm, nn.ReLU(), nn.Linear(hidden, outputs))

def make_regressor(widths):
    """h: linear layers with ReLU, (N, features) -> (N, 400)."""
    layers, inputs = [], widths["features"]
    for outputs in widths["regressor"]:
        layers += [nn.Linear(inputs, outputs), nn.ReLU()]
        inputs = outputs
    return nn.Sequential(*layers, nn.Linear(inputs, POINTS))

# %% DATA ------------------------------------------------------------------------------------------
def load_data(config, device):
    """data[0] for the pre-training and data[s] for each split s: (training, validation, test).

    Each of the three is a pair of cells (N, 32, 32) and labels (N, 400). The pre-training has no
    cells to validate on (None), and zeros (N,) for labels, which it does not use.
    """
    unlabelled = draw_cells(config.dataset, config.unlabelled, seed=99).float().to(device)
    size = config.limit + config.limit // 6  # the pool: six parts to train on, one to validate on
    pool, labels = labelled_cells(config, size, 1, device)
    test = labelled_cells(config, config.test, 2, device)
    data = [((unlabelled, torch.zeros(len(unlabelled), device=device)), None, test)]
    for split in range(1, config.splits + 1):
        order = torch.randperm(size, generator=torch.Generator().manual_seed(split)).to(device)
        rows, rest = order[:config.limit], order[config.limit:]
        data.append(((pool[rows], labels[rows]), (pool[rest], labels[rest]), test))
    return data

def labelled_cells(config, n, seed, device):
    """n cells (n, 32, 32) and their DOS (n, 400), float32, on the device.

    Labels are computed on the CPU, once: they are kept in data-root/photonics, and a computation
    that was stopped continues.
    """
    cells, labels = draw_cells(config.dataset, n, seed), torch.empty(0, POINTS)
    folder = Path(config.data_root) / "photonics"
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{config.dataset}-centered-cutoff{config.cutoff}-seed{seed}.pt"
    # kept labels are used only if their settings and the sum of their first cell are the same
    made_by = [K_LINE, BANDS, SMOOTHING, X_STEP, round(cells[0].sum().item(), 3)]
    if path.exists():
        try:
            kept = torch.load(path, weights_only=True)
            labels, same = kept["labels"], kept["made_by"] == made_by
        except Exception:  # a damaged file can raise nearly anything
            same = False
        if not same:
            stop(f"{path} is damaged or of another version: remove it to compute the labels anew")

    def solve(cell):
        return density_of_states(cell, config.cutoff).float()

    threads = torch.get_num_threads()
    block = 8 * threads  # cells from one write to the next
    torch.set_num_threads(1)  # the matrices are small: one core per cell is faster than all for one
    with ThreadPoolExecutor(threads) as workers:
        firsts = range(len(labels), n, block)
        for first in with_progress(firsts, len(firsts), f"labels of seed {seed}: part"):
            solved = workers.map(solve, cells[first:first + block].split(1))
            labels = torch.cat([labels, *solved])
            # another run may write these labels now, so each writes a file of its own
            own = path.with_name(f"{path.name}.{os.getpid()}")
            write(own, {"labels": labels, "made_by": made_by})
            os.replace(own, path)
    torch.set_num_threads(threads)
    return cells.float().to(device), labels[:n].to(device)

def midpoints(n):
    """The midpoints (n,) of n equal parts of the interval from -1/2 to 1/2, float64."""
    return (torch.arange(n, dtype=torch.float64) + 0.5) / n - 0.5

def draw_cells(kind, n, seed):
    """Permittivities (n, 32, 32), float64, of n unit cells of two materials, each of 1 to 20.

    The first index is x, the second y. A pixel is the mean of 3 x 3 points. The first cells are
    the same for every n.
    """
    generator = torch.Generator().manual_seed(seed)
    # of 16 numbers that are drawn for a cell the last two make its permittivities, the others its
    # shape (not all are used)
    drawn = torch.rand(n, 16, generator=generator, dtype=torch.float64)
    parts = []
    for part in drawn.split(500):  # all cells at once would take much memory
        if kind == "gpm":
            inside = level_set(part)
        else:
            inside = star(part)
        eps_in = 1 + 19 * part[:, 14, None, None]  # (n, 1, 1)
        eps_out = 1 + 19 * part[:, 15, None, None]
        fine = torch.where(inside, eps_in, eps_out)  # (n, 96, 96)
        parts.append(F.avg_pool2d(fine, 3))
    return torch.cat(parts)

def level_set(drawn):
    """gpm: where a random Fourier sum exceeds a level, (n, 96, 96); drawn is (n, 16) in 0..1.

    The level is a quantile of the sum on a grid of 50 x 50 points (authors' code), so that the
    outer material fills 1 to 99 % of the cell.
    """
    filling = 0.01 + 0.98 * drawn[:, 12]
    coarse = fourier_sum(drawn, torch.linspace(-0.5, 0.5, 50, dtype=torch.float64)).flatten(1)
    levels = [values.quantile(share) for values, share in zip(coarse, filling)]
    return fourier_sum(drawn, midpoints(3 * SIDE)) > torch.stack(levels)[:, None, None]

def fourier_sum(drawn, line):
    """Re sum_g c_g exp(2 pi i (g1 x + g2 y)) over g1, g2 = -1, 0, 1, for all x and y of line (X,).

    c_g = r exp(i phi) is the same for g1 and -g1, hence the mirror x -> -x. Returns (n, X, X).
    """
    r = drawn[:, :6].view(-1, 2, 3)  # indices: cell, |g1|, g2 + 1
    phi = 2 * math.pi * drawn[:, 6:12].view(-1, 2, 3)
    c = torch.polar(r, phi)[:, [1, 0, 1]]  # (n, 3, 3); indices: cell, g1 + 1, g2 + 1
    g = torch.tensor([-1, 0, 1])[:, None]
    waves = torch.exp(2j * math.pi * (g * line))  # (3, X), along x as along y
    return torch.einsum("ngh,gx,hy->nxy", c, waves, waves).real

def star(drawn):
    """blob: the points (n, 96, 96) of a star-shaped inclusion about the center; drawn is (n, 16).

    Its radius is r0 (1 + sum_m a_m cos(m theta + phi_m)), m = 1 to 4, and at most 0.48, with r0
    in 0.1..0.4 and |a_m| up to 0.3 / m. The side of the cell is 1.
    """
    line = midpoints(3 * SIDE)
    x, y = torch.meshgrid(line, line, indexing="ij")
    theta = torch.atan2(y, x)
    drawn = drawn[:, :, None, None]  # drawn[:, i] is (n, 1, 1)
    r0 = 0.1 + 0.3 * drawn[:, 0]
    waves = 0
    for m in range(1, 5):
        a = 0.3 * (2 * drawn[:, m] - 1) / m
        phi = 2 * math.pi * drawn[:, 4 + m]
        waves = waves + a * torch.cos(m * theta + phi)  # (n, 96, 96)
    radius = r0 * (1 + waves)
    return torch.hypot(x, y) < radius.clamp(max=0.48)

# %% SOLVER ----------------------------------------------------------------------------------------
# Lengths are in units of the cell's side a, wave vectors in 2 pi / a, frequencies in 2 pi c / a.
K_LINE = 25  # wave vectors along each direction
BANDS = 6  # per wave vector; in a hundred cells only the lowest four reached below x = 1
SMOOTHING = 0.010  # standard deviation in x of the Gaussian that smooths the DOS

def photonic_bands(eps, k, bands, cutoff=4):
    """The lowest frequencies (N, K, bands) of TM modes and group velocities (..., 2) in units of c.

    eps: permittivities (N, n, n) of N cells. k: wave vectors (K, 2). The field along z,
    E(r) = sum_g E_g exp(2 pi i (k + g) r) with |g1|, |g2| <= cutoff < n / 4, is a mode of frequency
    w if for every g
        |k + g|^2 E_g = w^2 sum_g' eps_(g - g') E_g',
    where eps_g are the Fourier coefficients of eps. The matrix eps_(g - g') is L L^+ (Cholesky; L^+
    is the conjugate transpose). With A = L^-1, D = diag(|k + g|^2) and E = A^+ u it becomes the
    Hermitian eigenvalue problem A D A^+ u = w^2 u. With |u| = 1, which is E^+ L L^+ E = 1, the
    group velocity is dw/dk = sum_g (k + g) |E_g|^2 / w (Hellmann-Feynman). All in float64.
    """
    n = eps.shape[-1]
    eps = eps.cpu().double()  # eigh of matrices larger than 32 is slow on GPUs
    line = torch.arange(-cutoff, cutoff + 1)
    g = torch.cartesian_prod(line, line)  # (M, 2): M = (2 cutoff + 1)^2 plane waves
    coefficients = torch.fft.fft2(eps) / n**2  # eps_g
    difference = (g[:, None] - g) % n  # (M, M, 2): g - g'; fft2 stores -1 at n - 1
    L = torch.linalg.cholesky(coefficients[:, difference[..., 0], difference[..., 1]])  # (N, M, M)
    A = torch.linalg.solve_triangular(L, torch.eye(len(g), dtype=L.dtype), upper=False)
    q = k.double()[:, None] + g  # k + g: (K, M, 2)
    q_squared = q.square().sum(2)  # (K, M)
    H = (A[:, None] * q_squared[:, None]) @ A.mH[:, None]  # A D A^+: (N, K, M, M)
    w_squared, u = torch.linalg.eigh(H)
    w = w_squared[..., :bands].clamp(min=0).sqrt()  # (N, K, bands)
    E = A.mH[:, None] @ u[..., :bands]  # (N, K, M, bands)
    w_velocity = E.abs().square().mT @ q  # w dw/dk: (N, K, bands, 2)
    moving = w[..., None] > 1e-6  # the one mode of frequency 0 has no velocity
    return w, torch.where(moving, w_velocity / w[..., None], 0.0)

def wave_vectors():
    """The centers (625, 2) of 25 x 25 squares that fill the Brillouin zone; number 312 is 0.

    The negative of number i is number 624 - i.
    """
    return torch.cartesian_prod(midpoints(K_LINE), midpoints(K_LINE))

def states_below(edges, w, velocities):
    """The share (..., B) of each wave vector's square with a frequency below each bin edge (B,).

    w (...,) and velocities (..., 2) are in the unit of the edges. Within its square a frequency is
    taken as linear, w + velocity dk (generalised Gilat-Raubenheimer method, arXiv:1711.07993). The
    frequencies of the square are then distributed as a trapezoid about w, with a base of
    2 h (|vx| + |vy|) and a flat top of 2 h ||vx| - |vy||; h is half the side of the square.
    """
    h = 0.5 / K_LINE
    vx = velocities[..., :1].abs()  # (..., 1)
    vy = velocities[..., 1:].abs()
    half_base = (h * (vx + vy)).clamp(min=1e-9)  # never 0
    half_top = h * (vx - vy).abs()
    slope = half_base - half_top  # the width of a slope; 0 if vx or vy is 0
    distance = edges - w[..., None]  # (..., B)
    t = distance.abs()
    # tail: the area beyond t, on one side of a trapezoid of area 1, 1 / (half_base + half_top) high
    part = ((half_base - t) / slope.clamp(min=1e-12)).clamp(0, 1)  # of the slope, beyond t
    triangle = part.square() * slope / (2 * (half_base + half_top))
    rectangle = t / (half_base + half_top)  # from w to t, under the top
    tail = torch.where(t < half_top, 0.5 - rectangle, triangle)
    return torch.where(distance < 0, tail, 1 - tail)

def density_of_states(eps, cutoff=4):
    """The DOS y (N, 400), float64, of permittivities (N, n, n): states per cell and unit of x.

    x is the frequency times the root of the mean permittivity, so that eps -> s eps leaves y as it
    is. Shifts, mirrors and turns do, too. y is smoothed by a Gaussian, which is reflected at x = 0,
    and leaves out the one state of frequency 0.
    """
    eps = eps.cpu().double()
    k = wave_vectors()[:K_LINE**2 // 2 + 1]  # 313 of 625: the frequencies at -k are those at k
    weights = torch.full((len(k), 1, 1), 2 / K_LINE**2, dtype=torch.float64)  # of k and -k
    weights[-1] /= 2  # the last is k = 0, its own negative
    w, velocities = photonic_bands(eps, k, BANDS, cutoff)
    w[:, -1, 0] = torch.inf  # the lowest band at k = 0: its state of frequency 0 is left out
    root = eps.mean((1, 2)).sqrt()[:, None, None]  # root * w is x
    edges = 0.0015 * torch.arange(701, dtype=torch.float64)  # 700 bins, 9 SMOOTHING beyond 0.96
    below = states_below(edges, root * w, root[..., None] * velocities)  # (N, K, bands, 701)
    counts = (weights * below).sum((1, 2)).diff(dim=1)  # states in each bin: (N, 700)
    centers = ((edges[1:] + edges[:-1]) / 2)[:, None]
    x = X_STEP * torch.arange(POINTS, dtype=torch.float64)
    gauss = torch.exp(-((x - centers) / SMOOTHING).square() / 2)  # (700, 400)
    gauss += torch.exp(-((x + centers) / SMOOTHING).square() / 2)  # the part reflected at x = 0
    return counts @ gauss / (SMOOTHING * math.sqrt(2 * math.pi))

# %% TRAIN -----------------------------------------------------------------------------------------
def learning_rate(step, total_steps, warmup_steps, peak, final=0.0):
    """Linear from 0 to peak at warmup_steps, then a cosine to final at total_steps."""
    if step < warmup_steps:
        return peak * step / warmup_steps
    if step >= total_steps:
        return final
    progress = (step - warmup_steps) / (total_steps - warmup_steps)
    return final + (peak - final) * (1 + math.cos(math.pi * progress)) / 2

def make_optimizer(method, config):
    """SGD for the pre-training, Adam for the fine-tuning, at the peak rate."""
    parameters = list(method.parameters())
    fused = parameters[0].is_cuda
    if method.split > 0:
        return torch.optim.Adam(parameters, config.tune_lr, fused=fused,
                                weight_decay=config.tune_weight_decay)
    return torch.optim.SGD(parameters, config.lr, momentum=0.9, fused=fused)

def start(config):
    """The device. Writes it and the precision into config, in place of "auto"."""
    if int(os.environ.get("WORLD_SIZE") or 1) > 1:
        stop(f"{SCRIPT}.py runs on one device: start it without torchrun, and unset WORLD_SIZE")
    if config.device == "auto":
        config.device = "cuda" if torch.cuda.is_available() else "cpu"
    if config.device == "cuda":
        config.device = "cuda:0"
    here = ["cpu"] + [f"cuda:{i}" for i in range(torch.cuda.device_count())]
    if config.device not in here:
        stop(f"there is no device {config.device} here, only {', '.join(here)}")
    device = torch.device(config.device)
    if device.type == "cuda":
        torch.cuda.set_device(device)
        torch.set_float32_matmul_precision("high")  # TF32
        torch.backends.cudnn.benchmark = True
    if config.precision == "auto":
        bf16 = device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
        config.precision = "bf16" if bf16 else "fp32"
    print(f"on {config.device}, {config.precision}, {torch.get_num_threads()} threads", flush=True)
    return device

def with_progress(items, total, name):
    """Yields the items; says after ten seconds, and then every now and then, how far they are."""
    began, due = time.time(), 10  # seconds
    for done, item in enumerate(items):
        passed = time.time() - began
        if done > 0 and passed > due:
            left = timedelta(seconds=round(passed / done * (total - done)))
            line = f" {name} {done} of {total}, {left} left"
            if sys.stdout.isatty():  # on a terminal: the same line, every second
                print(line, end="\r", flush=True)
                due = passed + 1
            else:  # in a file: a new line after 10, 20, 40, ... seconds
                print(line, flush=True)
                due = 2 * passed
        yield item

def stages(config):
    """The epochs of the run: a list of (split, epoch within its stage from 1, settings).

    split 0 is the pre-training. settings is the Config with the stage's epochs and batch_size.
    """
    tuning = replace(config, epochs=config.tune_epochs, batch_size=config.tune_batch_size)
    plan = []
    if config.mode != "supervised" and not config.pretrained:
        plan += [(0, epoch, config) for epoch in range(1, config.epochs + 1)]
    for split in range(1, config.splits + 1):
        plan += [(split, epoch, tuning) for epoch in range(1, tuning.epochs + 1)]
    return plan

def begin(config, split, pretrained, device):
    """Method and optimizer at the start of a stage; pretrained: weights of the encoder, or None."""
    # the hash of a tuple of integers is the same in every run
    torch.manual_seed(hash((config.seed, split)))
    # channels_last: the order in memory in which convolutions are fastest on a GPU
    method = Method(config, split).to(device, memory_format=torch.channels_last)
    if pretrained:
        method.encoder.load_state_dict(pretrained)
    optimizer = make_optimizer(method, config)
    if config.compile:
        for network in method.children():
            network.forward = torch.compile(network.forward, dynamic=False)  # keeps weights' names
    return method, optimizer

def batches(data, settings, split, epoch):
    """Yields the cells and labels of every batch of an epoch, in a random order.

    An incomplete last batch is left out.
    """
    cells, labels = data
    # all random numbers of an epoch follow from this seed
    torch.manual_seed(hash((settings.seed, split, epoch)))
    order = torch.randperm(len(cells)).to(cells.device)
    for step in range(len(cells) // settings.batch_size):
        first = step * settings.batch_size
        rows = order[first:first + settings.batch_size]
        yield cells[rows], labels[rows]

def train_epoch(method, optimizer, data, settings, epoch):
    """One pass over the cells; returns the means of the loss and its terms over the steps.

    data: cells and labels. epoch: its number in the stage. The rate falls as a cosine in the
    pre-training, and is constant in the fine-tuning.
    """
    steps, sums = len(data[0]) // settings.batch_size, {}
    epoch_batches = batches(data, settings, method.split, epoch)
    what = f"epoch {epoch} of {settings.epochs}: step"
    for step, batch in enumerate(with_progress(epoch_batches, steps, what)):
        if method.split == 0:
            now, total = (epoch - 1) * steps + step, settings.epochs * steps
            optimizer.param_groups[0]["lr"] = learning_rate(now, total, 0, settings.lr)
        loss, terms = method(*batch)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        for name, value in {"loss": loss, **terms}.items():
            sums[name] = sums.get(name, 0) + value.detach()  # .item() would wait for the GPU
    return {name: value.item() / steps for name, value in sums.items()}

def train(config, data, device, saved, pretrained):
    """Trains the epochs that a run lacks; returns the method of the last split and the log.

    saved: the checkpoint to continue from, or None. pretrained: the weights of the encoder that
    the fine-tuning starts from, if there are any yet. The log has a dict of the run, as epoch 0,
    and one of every epoch.
    """
    out, plan = Path(config.out), stages(config)
    log = [{"epoch": 0, "train_seconds": 0.0, "command": " ".join(["python", *sys.argv]),
            "device": torch.cuda.get_device_name() if device.type == "cuda" else "cpu",
            "torch": str(torch.__version__), "threads": torch.get_num_threads()}]
    if saved:
        log = saved["log"]
        method, optimizer = begin(config, log[-1]["split"], None, device)
        method.load_state_dict(saved["method"])
        optimizer.load_state_dict(saved["optimizer"])
    else:
        (out / "config.json").write_text(json.dumps(asdict(config), indent=1))
    done, saved_at = log[-1]["epoch"], time.time()
    print(f"{out}: {done} of {len(plan)} epochs done", flush=True)

    for epoch in range(done + 1, len(plan) + 1):
        split, stage_epoch, settings = plan[epoch - 1]
        stage = f"split {split}" if split > 0 else "pre-training"
        training, validation, test = data[split]
        if stage_epoch == 1:
            method, optimizer = begin(config, split, pretrained, device)
        if stage_epoch == 1 and split == 0:
            draw_views(out / "views.png", method, training[0][:4])
        began = time.time()
        means = train_epoch(method, optimizer, training, settings, stage_epoch)
        finite = all(parameter.isfinite().all() for parameter in method.parameters())
        if not finite or not math.isfinite(means["loss"]):
            stop(f"loss or weights are not finite in epoch {epoch}: lower "
                 f"--lr {config.lr:g} or --tune-lr {config.tune_lr:g}")
        passed = time.time() - began
        steps = len(training[0]) // settings.batch_size
        means["images_per_second"] = steps * settings.batch_size / passed
        if split > 0 and (stage_epoch % config.eval_every == 0 or stage_epoch == settings.epochs):
            for name, (cells, labels) in (("validation", validation), ("test", test)):
                means[f"{name}_error"] = 100 * dos_error(predict(method, cells), labels)
        log.append({"epoch": epoch, "train_seconds": log[-1]["train_seconds"] + passed,
                    "split": split, **means})
        left = timedelta(seconds=round(passed * (settings.epochs - stage_epoch)))
        shown = "  ".join(f"{name} {value:.4g}" for name, value in means.items())
        print(f"epoch {epoch}/{len(plan)}, {stage}  {shown}  {left} left in this stage", flush=True)
        if split == 0 and stage_epoch == settings.epochs:
            pretrained = method.encoder.state_dict()
        lines = [json.dumps(line) + "\n" for line in log]
        (out / "metrics.jsonl").write_text("".join(lines))
        if epoch == len(plan) or time.time() - saved_at > 60 * config.save_every:
            (out / "results.json").unlink(missing_ok=True)  # of a run whose checkpoint is gone
            write(out / "checkpoint.pt", {
                "script": SCRIPT, "config": asdict(config), "data": {}, "log": log,
                "method": method.state_dict(), "optimizer": optimizer.state_dict(),
                "pretrained": pretrained})
            saved_at = time.time()
    return method, log

def open_run(config, trained_on):
    """The checkpoint in config.out or None; ends the program if it is of another run."""
    path = Path(config.out) / "checkpoint.pt"
    if not path.exists():
        return None
    try:
        saved = torch.load(path, map_location="cpu", weights_only=True)
        then = {"script": saved["script"], **saved["config"], **saved["data"]}
    except Exception as problem:  # a damaged file can raise nearly anything
        stop(f"{path} cannot be read ({type(problem).__name__}): remove it or change --out")
    now = {"script": SCRIPT, **asdict(config), **trained_on}
    for name, value in now.items():
        if name not in FREE and then.get(name) != value:
            stop(f"{config.out} holds another run: {name} was {then.get(name)}, is {value}. Choose "
                 "another --out")
    return saved

def pretrained_encoder(config):
    """The encoder's weights in folder --pretrained, or in its subfolder of this mode; or None."""
    if not config.pretrained or config.mode == "supervised":
        return None
    path = Path(config.pretrained) / config.mode / "checkpoint.pt"
    if not path.exists():
        path = Path(config.pretrained) / "checkpoint.pt"
    try:
        saved = torch.load(path, map_location="cpu", weights_only=True)
        encoder, then = saved["pretrained"], saved["config"]
    except Exception as problem:  # a damaged file can raise nearly anything
        stop(f"--pretrained needs the folder of a run ({path}: {type(problem).__name__})")
    for name in ("dataset", "arch", "mode"):
        if then[name] != getattr(config, name):
            stop(f"{path} is of another encoder: {name} was {then[name]}, "
                 f"is {getattr(config, name)}")
    if encoder is None:
        stop(f"{path} is of a run that has not ended its pre-training")
    return encoder

def write(path, content):
    """Writes text, or a state for torch.load, beside path and renames it: all of it or nothing."""
    buffer = io.BytesIO()  # torch.save does not say plainly that a disk is full
    if isinstance(content, str):
        buffer.write(content.encode())
    else:
        torch.save(content, buffer)
    beside = path.with_name(path.name + ".new")
    beside.write_bytes(buffer.getbuffer())
    os.replace(beside, path)

def draw_views(path, method, cells):
    """A row for each cell: the cell, two views of it and, for essl, its four versions.

    x runs downwards, y to the right.
    """
    columns = [cells, *method.views(cells)]
    if method.predictor is not None:
        v, _ = versions(cells, method.config.dataset)
        columns += v.chunk(4)
    tiles = []
    for row in zip(*[to_images(column) for column in columns]):
        tiles += [frame(image, "white") for image in row]
    save_image(tiles, path, nrow=len(columns))

def frame(image, color):
    """An image (C, H, W) as a tile of the pictures: 3 channels, 96 pixels wide, with a border."""
    picture = ImageOps.fit(TF.to_pil_image(image).convert("RGB"), (96, 96))
    return TF.to_tensor(ImageOps.expand(picture, 3, color))

# %% EVALUATE --------------------------------------------------------------------------------------
def dos_error(prediction, target):
    """Relative error of DOS (N, 400): a fraction, the mean over the cells.

    Of a cell it is sum |prediction - target| / sum |target| over the points 100 to 399, x from
    0.24 to 0.96: below, cells hardly differ.
    """
    wrong = (prediction - target)[:, 100:].abs().sum(1)
    return (wrong / target[:, 100:].abs().sum(1)).mean().item()

@torch.no_grad()
@torch.compiler.set_stance("force_eager")  # else --compile would compile again for these sizes
def predict(method, cells):
    """The predicted DOS (N, 400) of cells, in eval mode."""
    method.eval()
    predictions = [method.predict_dos(part) for part in cells.split(256)]
    method.train()
    return torch.cat(predictions)

def evaluate(data, config, log):
    """Test errors in percent, their mean and standard deviation over the splits, from the log."""
    _, _, (cells, labels) = data[0]  # every stage has the same test cells
    results = {
        "dos_error_empty_lattice": 100 * dos_error(empty_lattice(labels.device), labels),
        "dos_error_protocol": f"{config.splits} splits, {len(cells)} test cells; dos_error: last "
                              "epoch; minimum: epoch of least validation or test error"}
    errors = {"dos_error": [], "dos_error_validation_minimum": [], "dos_error_test_minimum": []}
    for split in range(1, config.splits + 1):
        tested = [line for line in log[1:] if line["split"] == split and "test_error" in line]
        best = min(tested, key=lambda line: line["validation_error"])
        errors["dos_error"].append(tested[-1]["test_error"])  # of the last epoch
        errors["dos_error_validation_minimum"].append(best["test_error"])
        errors["dos_error_test_minimum"].append(min(line["test_error"] for line in tested))
    for name, values in errors.items():
        results[name] = torch.tensor(values).mean().item()
        results[name + "_std"] = torch.tensor(values).std(correction=0).item()
    for line in log:  # the last epoch of the pre-training counts
        if "transform_top1" in line:
            results["transform_top1"] = line["transform_top1"]
    return results

# %% MAIN ------------------------------------------------------------------------------------------
def parse_args(argv=None):
    """The Config of a command line: defaults < preset of the dataset < --quick < flags given."""
    parser = ArgumentParser(
        prog=f"{SCRIPT}.py", usage="%(prog)s [flags]", description=__doc__.split("\n")[0],
        epilog="--dataset and --quick change some of these defaults: see PRESETS in the script.",
        argument_default=SUPPRESS, allow_abbrev=False)  # SUPPRESS: flags not given are left out
    for setting in fields(Config):
        parser.add_argument("--" + setting.name.replace("_", "-"), **setting.metadata)
    given = vars(parser.parse_args(argv))
    settings = given
    if "quick" in given:
        settings = QUICK | given
    preset = PRESETS.get(settings.get("dataset"), {})
    config = Config(**(preset | settings))
    check(config)
    if not config.out:
        if config.pretrained:
            given["pretrained"] = Path(config.pretrained).resolve().name
        words = [SCRIPT]
        words += [f"{name}={given[name]}" for name in asdict(config)
                  if name in given and name not in FREE]
        config.out = "runs/" + "-".join(words)
    config.out = os.path.expanduser(config.out)
    config.data_root = os.path.expanduser(config.data_root)
    config.pretrained = os.path.expanduser(config.pretrained)
    return config

def check(config):
    """Ends the program if a setting is impossible. `not value > 0` is true of nan, too."""
    positive = ("test", "cutoff", "temperature", "splits", "epochs", "lr", "tune_epochs", "tune_lr",
                "eval_every")
    for name, value in asdict(config).items():
        if name in positive and not value > 0:
            stop(f"--{name.replace('_', '-')} must be more than 0")
        if not isinstance(value, str) and not value >= 0:
            stop(f"--{name.replace('_', '-')} must be 0 or more")
    if config.pretrained and config.mode == "supervised":
        stop("--pretrained is not for --mode supervised, which starts from random weights")
    if 4 * config.cutoff >= SIDE:
        stop(f"--cutoff must be less than {SIDE // 4}")
    if config.limit < 6:
        stop("--limit must be 6 or more: a sixth as many cells validate")
    if min(config.batch_size, config.tune_batch_size) < 2:
        stop("--batch-size and --tune-batch-size must be 2 or more")
    if config.batch_size > config.unlabelled:
        stop(f"--batch-size {config.batch_size} is more than the {config.unlabelled} cells "
             "of --unlabelled")
    if config.tune_batch_size > config.limit:
        stop(f"--tune-batch-size {config.tune_batch_size} is more than the {config.limit} "
             "cells of --limit")

def main(argv=None):
    """Runs a command line: trains, evaluates and writes the results."""
    config = parse_args(argv)
    try:
        device = start(config)
        if config.mode == "all":
            run_all_modes(config, device)
        else:
            run(config, device)
    except KeyboardInterrupt:
        stop("stopped; the same command continues from the last checkpoint, if there is one")
    except OSError as problem:  # a full disk, or a folder that cannot be written
        stop(f"{problem}. Once this is fixed, the same command continues")
    except RuntimeError as problem:
        if "out of memory" not in str(problem) and "allocate memory" not in str(problem):
            raise
        stop("memory is full. In training: use a smaller --batch-size, and another --out. In an "
             "evaluation: free memory, and the same command continues")

def run_all_modes(config, device):
    """Runs the four modes, each in its folder in --out, and writes their errors to results.json."""
    out, results = Path(config.out), {}
    if (out / "checkpoint.pt").exists():
        stop(f"{out} holds another run. Choose another --out")
    for mode in MODES:
        pretrained_encoder(replace(config, mode=mode))  # a wrong folder ends the program now
    for mode in MODES:
        run(replace(config, mode=mode, out=str(out / mode)), device)
        of_mode = json.loads((out / mode / "results.json").read_text())
        results.update(of_mode)  # what all modes have is in the end that of the last, essl
        results[f"dos_error_{mode}"] = of_mode["dos_error"]
        results[f"dos_error_{mode}_std"] = of_mode["dos_error_std"]
    write(out / "results.json", json.dumps(results, indent=1))
    show_results(out)

def run(config, device):
    """Trains and evaluates one mode, or what is left to do of it."""
    out = Path(config.out)
    if any((out / mode).exists() for mode in MODES):
        stop(f"{out} holds a run of --mode all. Choose another --out")
    out.mkdir(parents=True, exist_ok=True)
    saved = open_run(config, {})  # {}: no data to compare, the flags make the cells
    if saved is None or not (out / "results.json").exists():
        if saved:
            pretrained = saved["pretrained"]
        else:
            pretrained = pretrained_encoder(config)
        data = load_data(config, device)
        method, log = train(config, data, device, saved, pretrained)
        finish(method, data, config, log)
    show_results(out)
    print(f"its spectra: python compare.py {out}")

def finish(method, data, config, log):
    """Evaluates; writes encoder.pt, as fine-tuned on the last split, and results.json."""
    out = Path(config.out)
    write(out / "encoder.pt", method.encoder.cpu().state_dict())
    results = log[0] | log[-1] | {"epochs": config.epochs, "seed": config.seed}
    results["peak_memory_gb"] = torch.cuda.max_memory_allocated() / 2**30  # of the GPU
    results.update(evaluate(data, config, log))
    for name, value in results.items():
        if isinstance(value, float):
            results[name] = float(f"{value:.4g}")
    write(out / "results.json", json.dumps(results, indent=1))

def show_results(out):
    """Prints the errors in results.json: means, and standard deviations over the splits."""
    results = json.loads((out / "results.json").read_text())
    print(f"{out} is finished; its errors, in results.json:")
    print(f"  {'dos_error_empty_lattice':32} {results['dos_error_empty_lattice']} %")
    for name, value in results.items():
        if name + "_std" in results:
            print(f"  {name:32} {value} % (+- {results[name + '_std']})")

if __name__ == "__main__":
    # in a notebook the arguments are those of its kernel: -f FILE
    in_notebook = "kernel_launcher" in sys.argv[0] or sys.argv[1:2] == ["-f"]
    main(["--quick"] if in_notebook else None)
