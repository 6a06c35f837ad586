"""E-SSL for photonic crystals: the density of states of a unit cell, learnt from few labels.

R. Dangovski, L. Jing, C. Loh, S. Han, A. Srivastava, B. Cheung, P. Agrawal, M. Soljacic,
"Equivariant Contrastive Learning" (E-SSL), ICLR 2022, arXiv:2111.00899, photonics experiment.

Idea. A photonic crystal is a periodic arrangement of two materials. Its density of states (DOS),
the number of light modes near each frequency, costs an eigenvalue problem at hundreds of wave
vectors; images of unit cells cost nothing. So an encoder is first trained without labels: SimCLR
makes it *invariant* to what leaves the DOS as it is (shifts, mirrors, turns), and E-SimCLR lets a
head *predict* one of these symmetries instead. Then few labelled cells teach it the DOS.

Algorithm, for a batch of N cells, encoder f, projector p1, predictor p2:
  1. draw two views of every cell; loss_invariance = NT-Xent of the two p1(f(view));
  2. v = every cell in all four ways (gpm: turns by 90 degrees; blob: shifts by half a cell);
  3. loss_equivariance = cross-entropy of p2(f(v)) against the class of the way;
  4. step on loss_invariance + alpha * loss_equivariance. simclr: alpha = 0; simclr+transform: a
     random one of the four ways is part of every view instead;
  5. then fine-tune: a head on f regresses y(x) - 2 pi x, the DOS (units: SOLVER) less that of empty
     space, on views of 3,000 labelled cells. supervised: this alone. --frozen: the head alone.

Usage
  python photonics_reg.py --quick         the four modes, a CPU, two minutes
  python photonics_reg.py --mode all      gpm at full scale, one GPU
  python photonics_reg.py --mode all --frozen --pretrained "runs/photonics_reg-mode=all"

Paper, error on gpm, supervised, SimCLR, SimCLR + Transform, E-SimCLR: 3.21, 3.12, 3.14, 3.09 %
fine-tuned; 5.45, 3.21, 3.31, 3.19 % with a frozen encoder. Measured here: README.md.

What changes a number, against the paper [P] and the authors' code [C]:
  1. [C] has files made with MPB and MATLAB; here cells and labels are our own. gpm follows the
     published law (inferred: its mirror-symmetric branch draws like the other). Blob's law is not
     published: "blob-like", one centered smooth inclusion. Pixels lie symmetrically about gpm's
     mirror; on MPB's grid the parity of a pixel row betrays the turn.
  2. DOS: 6 bands, not 10; states fill bins exactly ([C]: sampled); a Gaussian of fixed width in x
     ([C]: 100 bins of the highest band); peaks above 40 stay; the mean permittivity is the image's
     ([C]: the one asked for). As in [C], the state of frequency 0 is left out.
  3. gpm's pretext task has two classes, turned by +-90 degrees or not, as in [P]; [C] has four.
     Inferred: [P] shows all four turns; supervised mode has the views and settings of step 5.
  4. As in [C]: all default settings, squared error, BatchNorm that adapts though frozen, no error
     below x = 0.24. [P]: 250 epochs of batch 512, --absolute, rates and alpha swept, all x.
  5. The last epoch counts; [C] takes the lowest test error of two encoders and 100 epochs.
  6. A split is a random 6/7 of one pool, so two share most labels; [C] draws its 3,000 once. Cells
     are shuffled, ragged batches left out, the cosine ends with the run ([C]: none of these).
Ours: --arch small; bf16 and TF32 on GPUs. Left out: [C]'s grid and classes (results/README.md).
"""
import io
import json
import math
import os
import sys
import time
from argparse import SUPPRESS, ArgumentParser
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field, fields, replace
from datetime import timedelta
from itertools import pairwise
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F

SCRIPT = "photonics_reg"
WORLD = int(os.environ.get("WORLD_SIZE") or 1)  # number of processes that torchrun started
LOCAL_RANK = int(os.environ.get("LOCAL_RANK") or 0)  # among those of this machine

# %% CONFIG ----------------------------------------------------------------------------------------
MODES = ("supervised", "simclr", "simclr+transform", "essl")
PRESETS = {"gpm": {}, "blob": dict(unlabelled=15000, test=1999)}
QUICK = dict(mode="all", arch="small", epochs=10, batch_size=64, lr=0.01, tune_epochs=60,
             tune_lr=1e-3, limit=180, unlabelled=1024, test=90, splits=1, cutoff=3, eval_every=10)
FREE = ("data_root", "out", "device", "compile", "save_every", "eval_every")  # may change in a run
LEAST = dict(epochs=1, batch_size=2, lr=1e-9, tune_epochs=1, tune_batch_size=2, tune_lr=1e-9,
             eval_every=1, limit=6, test=1, splits=1, temperature=1e-9)  # others: 0

def option(group, default, help, choices=None):
    """A field of Config, with its group and line in --help."""
    return field(default=default, metadata={"group": group, "help": help, "choices": choices})

@dataclass
class Config:
    """One field, one flag. Defaults: gpm, the code's settings, the paper's classes."""
    dataset: str = option("data", "gpm", "gpm has a mirror, blob one inclusion", tuple(PRESETS))
    data_root: str = option("data", "data", "folder in which computed labels are kept")
    limit: int = option("data", 3000, "labelled cells to learn from (paper: 3000)")
    unlabelled: int = option("data", 20480, "cells of the pre-training (code: 20480; blob 15000)")
    test: int = option("data", 2000, "cells of the test (code: 2000; blob 1999)")
    cutoff: int = option("data", 4, "plane waves of the labels have |g1|, |g2| up to this")
    arch: str = option("training", "paper", "networks; small: ours", ("paper", "small"))
    epochs: int = option("training", 200, "of the pre-training (code: 200; paper: 250)")
    batch_size: int = option("training", 256, "cells per step of it (code: 256; paper: 512)")
    lr: float = option("training", 1e-3, "its rate, whatever the batch (paper: 1e-3 to 1e-5)")
    tune_epochs: int = option("training", 100, "of the fine-tuning (code: 100)")
    tune_batch_size: int = option("training", 64, "cells per step of it (code: 64)")
    tune_lr: float = option("training", 1e-4, "its constant rate (code: 1e-4)")
    tune_weight_decay: float = option("training", 1e-5, "its weight decay (code: 1e-5)")
    seed: int = option("training", 0, "of the weights, the order and the views; not of the cells")
    device: str = option("run", "auto", "cpu, cuda, cuda:1 (auto: cuda where there is one)")
    precision: str = option("run", "auto", "auto: bf16 if the GPU has it", ("auto", "bf16", "fp32"))
    compile: bool = option("run", False, "torch.compile the networks")
    eval_every: int = option("run", 1, "epochs of fine-tuning between tests (beside its last)")
    save_every: float = option("run", 5.0, "minutes between checkpoints, at the end of an epoch")
    out: str = option("run", "", "folder of the run (default: runs/, named after the flags)")
    quick: bool = option("run", False, "few cells, small networks: two minutes on a CPU")
    mode: str = option("method", "essl", "all: one after the other, in OUT/MODE", (*MODES, "all"))
    alpha: float = option("method", 5.0, "weight of the prediction (code: 5; paper: 0.2 to 10)")
    temperature: float = option("method", 0.1, "of NT-Xent (code: 0.1)")
    splits: int = option("method", 3, "labelled splits, each fine-tuned anew (paper: 3)")
    absolute: bool = option("method", False, "fine-tune on absolute errors (paper; code: squared)")
    frozen: bool = option("method", False, "fine-tune the head alone (paper's second table)")
    pretrained: str = option("method", "", "folder of a run whose encoder to take")

def check(condition, message, code=2, alike=True):
    """Ends the program with one line unless the condition holds; one process speaks for all."""
    if not condition:
        if LOCAL_RANK == 0 or not alike:
            print("error:", *message.split(), file=sys.stderr)
        raise SystemExit(code)

def parse_args(argv=None):
    """Config of a command line: defaults < preset of the dataset < --quick < explicit flags."""
    parser = ArgumentParser(f"{SCRIPT}.py", "%(prog)s [flags]", __doc__.split("\n")[0],
                            Config.__doc__, argument_default=SUPPRESS, allow_abbrev=False)
    parser.error = lambda message: check(False, f"{message} (see --help)")
    groups = {g: parser.add_argument_group(g) for g in ("data", "training", "run", "method")}
    for f in fields(Config):
        group, words, choices = f.metadata.values()
        words += f": {', '.join(choices)}" if choices else ""
        kind = {"type": f.type, "choices": choices, "metavar": f.type.__name__.upper()}
        groups[group].add_argument(f"--{f.name.replace('_', '-')}", help=f"{words} [{f.default}]",
                                   **{"action": "store_true"} if f.type is bool else kind)
    given = vars(parser.parse_args(argv))
    quick = QUICK if "quick" in given else {}
    dataset = given.get("dataset", Config.dataset)
    config = Config(**asdict(Config(dataset)) | PRESETS[dataset] | quick | given)
    for name, value in vars(config).items():
        check(isinstance(value, str) or LEAST.get(name, 0) <= value < 2 ** 32,
              f"--{name.replace('_', '-')} is {LEAST.get(name, 0)} to 4294967295, not {value}")
    check(0 < 4 * config.cutoff < SIDE, f"--cutoff is 1 to {SIDE // 4 - 1}, not {config.cutoff}")
    check(config.batch_size <= config.unlabelled,
          f"--batch-size {config.batch_size} is more than the {config.unlabelled} unlabelled cells")
    check(config.tune_batch_size <= config.limit,
          f"--tune-batch-size {config.tune_batch_size} is more than the {config.limit} cells")
    name = SCRIPT
    for flag, value in vars(config).items():
        if flag in given and flag not in FREE:
            value = f"{value:g}" if isinstance(value, float) else Path(str(value)).resolve().name
            name += f"-{flag.replace('_', '-')}" + (f"={value}" if value != "True" else "")
    config.out = os.path.expanduser(config.out or f"runs/{name}")  # no shell does it for --out=~/x
    return config

# %% DATA ------------------------------------------------------------------------------------------
SIDE = 32  # pixels of a cell, a / 32 each

def draw_cells(kind, n, seed):
    """Permittivity (n, 32, 32), float64, of n unit cells of two materials, each of 1 to 20.

    Pixel (i, j) is the mean over a 3 x 3 sub-grid about x = (i + 1/2) / 32 - 1/2 and y likewise, in
    units of the lattice constant a. The first cells are the same for every n. gpm: level sets of
    Fourier sums with the mirror x -> -x (plane group pm). blob: a centered, star-shaped inclusion.
    """
    # columns: 0 to 11 the shape, 12 the filling, 14 and 15 the permittivities inside and outside
    drawn = torch.rand(n, 16, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    line = (torch.arange(3 * SIDE, dtype=torch.float64) + 0.5) / (3 * SIDE) - 0.5
    coarse = torch.linspace(-0.5, 0.5, 50, dtype=torch.float64)  # where [C] takes the quantile
    eps_in, eps_out = (1 + 19 * drawn[:, column, None, None] for column in (14, 15))  # (n, 1, 1)
    cells = []
    for rows in torch.arange(n).split(500):
        if kind == "gpm":
            level_field, known = (level_function(drawn[rows], x) for x in (line, coarse))
            filling = 0.01 + 0.98 * drawn[rows, 12]  # of the outer material
            level = torch.stack([f.quantile(q) for f, q in zip(known.flatten(1), filling)])
            inside = level_field > level[:, None, None]
        else:
            inside = star(drawn[rows], line)
        fine = torch.where(inside, eps_in[rows], eps_out[rows])  # (rows, 96, 96)
        cells.append(F.avg_pool2d(fine[:, None], 3)[:, 0])
    return torch.cat(cells)

def level_function(drawn, line):
    """F(x, y) = Re sum_G c_G exp(2 pi i G (x, y)), nine G, c equal for (g1, g2) and (-g1, g2).

    c = r exp(i phi), r in 0..1 and phi in 0..2 pi uniform: drawn (n, >= 12), 0..1. Returns
    (n, X, X) on the grid line x line.
    """
    r, phi = drawn[:, :6].view(-1, 2, 3, 1), 2 * math.pi * drawn[:, 6:12].view(-1, 2, 3, 1)
    angle = 2 * math.pi * line
    along_x = torch.stack([torch.ones_like(line), 2 * angle.cos()])  # g1 = 0; 1 and -1 together
    along_y = r * torch.cos(torch.tensor([[-1.0], [0.0], [1.0]]) * angle + phi)  # (n, 2, 3, X)
    return torch.einsum("ax,nagy->nxy", along_x, along_y)

def star(drawn, line):
    """Where the point is within r0 (1 + sum_n a_n cos(n theta + phi_n)) of the center: (n, X, X).

    n = 1 to 4, r0 in 0.1..0.4 a, |a_n| up to 0.3 / n, radius up to 0.48 a; from drawn (n, >= 9).
    """
    x, y = torch.meshgrid(line, line, indexing="ij")
    orders = torch.arange(1, 5, dtype=torch.float64)
    theta = orders[:, None, None] * torch.atan2(y, x)  # (4, X, X)
    a = 0.3 * (2 * drawn[:, 1:5] - 1) / orders
    waves = torch.cos(theta + 2 * math.pi * drawn[:, 5:9, None, None])  # (n, 4, X, X)
    radius = 1 + (a[..., None, None] * waves).sum(1)
    radius = (0.1 + 0.3 * drawn[:, 0, None, None]) * radius
    return torch.hypot(x, y) < radius.clamp(max=0.48)

def labelled_cells(config, n, seed, device):
    """Cells (n, 32, 32) and their density of states (n, 400), float32, on the device.

    Labels are computed once and kept in data-root/photonics; a stopped computation continues.
    """
    cells, labels = draw_cells(config.dataset, n, seed), torch.empty(0, POINTS)
    folder = Path(config.data_root, "photonics").expanduser()
    path = folder / f"{config.dataset}-centered-cutoff{config.cutoff}-seed{seed}.pt"
    made_by = [K_LINE, BANDS, WIDTH, STEP, round(cells[0].sum().item(), 3)]
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as problem:
        check(False, f"cannot keep labels in {folder} ({problem}): choose a --data-root")
    if path.exists():
        try:
            kept = torch.load(path, weights_only=True)
            labels, same = kept["labels"], kept["made_by"] == made_by
        except Exception:  # a damaged file can raise nearly anything
            same = False
        check(same, f"{path} is damaged or of another version: remove it, labels are made again")
    threads, known, began = torch.get_num_threads(), len(labels), time.time()
    workers, block, saved_at = threads, 1, began
    if device.type == "cuda":
        workers, block = 1, max(1, 200_000 // (2 * config.cutoff + 1) ** 4)
    torch.set_num_threads(1)  # small matrices: one per core is faster than all cores on each
    with ThreadPoolExecutor(workers) as pool:
        while len(labels) < n:
            parts = cells[len(labels):][:8 * block * workers].split(block)
            new = pool.map(lambda x: density_of_states(x.to(device), config.cutoff).cpu(), parts)
            labels = torch.cat([labels, *new]).float()
            if len(labels) >= n or time.time() - saved_at > 10:
                write(path, {"labels": labels, "made_by": made_by})
                saved_at = time.time()
                left = (saved_at - began) / (len(labels) - known) * (n - len(labels))
                print(f"labels, seed {seed}: {len(labels)} of {n}, about "
                      f"{timedelta(seconds=round(left))} left", flush=True)
    torch.set_num_threads(threads)
    return cells.float().to(device), labels[:n].to(device)

def load_data(config, device):
    """For the pre-training and every split: (cells, labels) to train on, to validate and to test.

    Cells are permittivities (N, 32, 32), labels densities of states (N, 400); of the pre-training,
    which is not validated, zeros (N,). All are on the device.
    """
    cells = draw_cells(config.dataset, config.unlabelled, 99).float().to(device)
    pool, labels = labelled_cells(config, config.limit + config.limit // 6, 1, device)
    test = labelled_cells(config, config.test, 2, device)
    data = [((cells, torch.zeros(len(cells), device=device)), None, test)]
    for split in range(1, config.splits + 1):
        order = torch.randperm(len(pool), generator=torch.Generator().manual_seed(split)).to(device)
        rows, rest = order[:config.limit], order[config.limit:]
        data.append(((pool[rows], labels[rows]), (pool[rest], labels[rest]), test))
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()  # the solver's does not count
    return data

def batches(data, config, epoch, device):
    """Yields cells and labels of each batch of an epoch, in a random order."""
    images, labels = data[0]
    steps = len(labels) // config.batch_size  # the ragged rest is left out
    rows = torch.randperm(len(labels))[:steps * config.batch_size].view(steps, -1)
    yield from ((images[row], labels[row]) for row in rows.to(device))

# %% AUGMENT ---------------------------------------------------------------------------------------
def draw_symmetries(n, kind, transformed, device):
    """Parameters of n views: rows and columns to roll (n, 2), flip and turn (n,).

    gpm: any shift, and no flip or one of two. blob: the flip and a turn by 0 to 3 quarters.
    transformed: gpm's turn, or blob's shift by half a cell, too.
    """
    shift = torch.randint(SIDE, (n, 2), device=device)
    half = SIDE // 2 * torch.randint(2, (n, 2), device=device)
    turn = torch.randint(4, (n,), device=device)
    flip = torch.randint(3, (n,), device=device)
    if kind == "gpm":
        return {"shift": shift, "flip": flip, "turn": turn * transformed}
    return {"shift": half * transformed, "flip": flip, "turn": turn}

def apply_symmetries(cells, parameters):
    """Cells (N, 32, 32), flipped (1: x, 2: y), turned counter-clockwise, then rolled around."""
    flip, turn, shift = (parameters[name] for name in ("flip", "turn", "shift"))
    n, line = torch.arange(len(cells), device=cells.device), torch.arange(SIDE, device=cells.device)
    cells = torch.stack([cells, cells.flip(1), cells.flip(2)])[flip, n]
    cells = torch.stack([cells.rot90(k, (1, 2)) for k in range(4)])[turn, n]
    rows, columns = ((line - shift[:, i, None]) % SIDE for i in (0, 1))  # where each comes from
    return cells[n[:, None, None], rows[:, :, None], columns[:, None, :]]

def versions(cells, kind):
    """N cells transformed in all four ways (4N, 32, 32), way by way, and their classes (4N,).

    gpm: by 0, 90, 180, 270 degrees, class 1 if the mirror turned by 90. blob: shifted by (0, 0),
    (0, 1), (1, 0), (1, 1) half cells, each a class.
    """
    way = torch.arange(4, device=cells.device).repeat_interleave(len(cells))
    if kind == "gpm":
        return torch.cat([cells.rot90(k, (1, 2)) for k in range(4)]), way % 2
    half = SIDE // 2
    shifts = [(half * i, half * j) for i in (0, 1) for j in (0, 1)]
    return torch.cat([cells.roll(shift, (1, 2)) for shift in shifts]), way

# %% MODEL -----------------------------------------------------------------------------------------
# channels of the convolutions, features, widths of the heads p1 and p2, of the DOS head
WIDTHS = {"paper": ((64, 256, 256), 1024, (512, 256), (1024, 1024, 512)),
          "small": ((16, 32, 64), 256, (128, 64), (256, 256, 256))}

def make_cell_encoder(channels, features):
    """Three 7 x 7 convolutions and two linear layers: (N, 1, 32, 32) -> (N, features)."""
    layers, inputs = [], 1
    for outputs, pool in zip(channels, (2, 4, 4)):
        layers += [nn.Conv2d(inputs, outputs, 7, padding=3), nn.BatchNorm2d(outputs), nn.ReLU(),
                   nn.MaxPool2d(pool)]
        inputs = outputs
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(inputs, features), nn.ReLU(),
                         nn.Linear(features, features))

class Head(nn.Module):
    """p1 or p2: (N, features) -> (N, outputs). One BatchNorm serves both layers, as in the code."""

    def __init__(self, features, hidden, outputs):
        super().__init__()
        self.first, self.second = nn.Linear(features, hidden), nn.Linear(hidden, hidden)
        self.norm, self.last = nn.BatchNorm1d(hidden), nn.Linear(hidden, outputs)

    def forward(self, x):
        x = F.relu(self.norm(self.first(x)))
        x = F.relu(self.norm(self.second(x)))
        return self.last(x)

# %% METHOD ----------------------------------------------------------------------------------------
def sphere(z):
    """Rows (N, D) divided by their norms, in float32 or better."""
    return F.normalize(z.to(torch.promote_types(z.dtype, torch.float32)))

def nt_xent(z1, z2, temperature):
    """InfoNCE of two views (N, D): each of 2N rows against its other view and 2N - 2 negatives."""
    z = sphere(torch.cat([z1, z2]))
    s = z @ z.T / temperature  # (2N, 2N), cosines
    s = s.masked_fill(torch.eye(len(s), dtype=torch.bool, device=s.device), -torch.inf)
    return F.cross_entropy(s, torch.arange(len(s), device=s.device).roll(len(z1)))

def empty_lattice(device):
    """Density of states (400,) of a homogeneous cell at the points x of the labels: 2 pi x."""
    return 2 * math.pi * torch.arange(POINTS, device=device) * STEP

class Method(nn.Module):
    """Pre-training (split 0) or fine-tuning on a labelled split (1, 2, ...).

    Cells (N, 32, 32) and their DOS (N, 400; not read in pre-training) to loss and terms of the log.
    """

    def __init__(self, config, split=0):
        super().__init__()
        channels, features, (hidden, outputs), widths = WIDTHS[config.arch]
        self.config, self.split = config, split
        self.encoder = make_cell_encoder(channels, features)
        self.projector = self.predictor = self.regressor = None
        if split:
            layers = [(nn.Linear(a, b), nn.ReLU()) for a, b in pairwise((features, *widths))]
            self.regressor = nn.Sequential(*sum(layers, ()), nn.Linear(widths[-1], POINTS))
            self.encoder.requires_grad_(not config.frozen)
        else:
            self.projector = Head(features, hidden, outputs)
            if config.mode == "essl":
                self.predictor = Head(features, hidden, 2 if config.dataset == "gpm" else 4)

    def forward(self, cells, labels):
        f, p1, p2, config = self.features, self.projector, self.predictor, self.config
        if self.split:
            y = self.regress(self.view(cells))  # (N, 400)
            return (F.l1_loss if config.absolute else F.mse_loss)(y, labels), {}

        z1 = p1(f(self.view(cells)))  # (N, D)
        z2 = p1(f(self.view(cells)))
        loss_invariance = nt_xent(z1, z2, config.temperature)
        terms = {"invariance": loss_invariance.detach(), "std": spread(z1)}
        if p2 is None:
            return loss_invariance, terms

        v, target = versions(cells, config.dataset)  # (4N, 32, 32), (4N,)
        v_equivariance = p2(f(v))  # (4N, classes)
        loss_equivariance = F.cross_entropy(v_equivariance, target)
        terms["equivariance"] = loss_equivariance.detach()
        terms["transform_top1"] = 100 * (v_equivariance.argmax(1) == target).float().mean()
        return loss_invariance + config.alpha * loss_equivariance, terms

    def features(self, cells):
        """Features (N, D), float32, of permittivities 1 to 20."""
        bf16 = precision(self.config, cells.device) == "bf16"
        with torch.autocast(cells.device.type, torch.bfloat16, enabled=bf16):
            return self.encoder((cells[:, None] - 1) / 19).float()

    def regress(self, cells):
        """The predicted density of states (N, 400)."""
        return self.regressor(self.features(cells)) + empty_lattice(cells.device)

    def view(self, cells):
        """A random view of the cells, in fine-tuning as in the mode's pre-training."""
        transformed = self.config.mode == "simclr+transform"
        drawn = draw_symmetries(len(cells), self.config.dataset, transformed, cells.device)
        return apply_symmetries(cells, drawn)

def precision(config, device):
    """Of the backbone: bf16 on GPUs that have it, unless --precision says otherwise."""
    able = device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 0)
    return config.precision if config.precision != "auto" else "bf16" if able else "fp32"

def spread(z):
    """Std of the normalised embeddings (N, D) over its ideal 1 / sqrt(D); 0 if all are equal."""
    return F.normalize(z.detach().float()).std(0).mean() * z.shape[1] ** 0.5

# %% TRAIN -----------------------------------------------------------------------------------------
def learning_rate(step, total_steps, warmup_steps, peak, final=0.0):
    """Linear from 0 to peak at warmup_steps, then a cosine to final at total_steps."""
    if step < warmup_steps:
        return peak * step / warmup_steps
    turn = (step - warmup_steps) / (total_steps - warmup_steps) if step < total_steps else 1
    return final + (peak - final) * (1 + math.cos(math.pi * turn)) / 2

def make_optimizer(method, config):
    """SGD for the pre-training, Adam for the fine-tuning; train sets the rate of every step."""
    parameters = [p for p in method.parameters() if p.requires_grad]
    fused = parameters[0].is_cuda
    if method.split:
        return torch.optim.Adam(parameters, config.tune_lr, fused=fused,
                                weight_decay=config.tune_weight_decay)
    return torch.optim.SGD(parameters, config.lr, momentum=0.9, fused=fused)

def write(path, content):
    """Writes text, or a state for torch.load, whole or not at all: beside, then renamed."""
    buffer = io.BytesIO(content.encode() if isinstance(content, str) else b"")
    if not isinstance(content, str):
        torch.save(content, buffer)
    beside = path.with_name(f"{path.name}.{os.getpid()}")
    try:
        beside.write_bytes(buffer.getbuffer())
        os.replace(beside, path)
    finally:
        beside.unlink(missing_ok=True)

def open_run(config, data):
    """The checkpoint in the run's folder, which must be of this config and data, or None."""
    path = Path(config.out, "checkpoint.pt")
    if not path.exists():
        check(not path.with_name("results.json").exists(), f"{path} is lost: choose another --out")
        return None
    try:
        saved = torch.load(path, map_location="cpu", weights_only=True)
        script, stored = saved["script"], saved["data"]
        then = saved["config"] | {name: stored.get(name) for name in data}
    except Exception as problem:  # a damaged file can raise nearly anything
        check(False, f"{path} is damaged ({type(problem).__name__}): remove it or change --out")
    check(script == SCRIPT, f"{path} is a checkpoint of {script}.py, not of {SCRIPT}.py")
    differ = "; --".join(f"{name.replace('_', '-')} {then.get(name)} then, {value} now"
                         for name, value in (asdict(config) | data).items()
                         if name not in FREE and then.get(name) != value)
    check(not differ, f"{config.out} holds another run (--{differ}): use its flags or a new --out")
    return saved

def pretrained_encoder(config):
    """Weights that the run in --pretrained, or in its folder MODE, has pre-trained; else None."""
    if not config.pretrained or config.mode == "supervised":
        return None
    path = Path(config.pretrained, config.mode, "checkpoint.pt")
    path = path if path.exists() else Path(config.pretrained, "checkpoint.pt")
    try:
        saved = torch.load(path, map_location="cpu", weights_only=True)
        encoder, then = saved["pretrained"], saved["config"]
    except Exception as problem:  # a damaged file can raise nearly anything
        check(False, f"--pretrained needs the folder of a run ({path}: {type(problem).__name__})")
    differ = [f"--{name} {then[name]} then, {getattr(config, name)} now"
              for name in ("dataset", "arch", "mode") if then[name] != getattr(config, name)]
    check(not differ, f"the encoder of {path} is another: {', '.join(differ)}")
    check(encoder, f"{path} is of a run that has not ended its pre-training")
    return encoder

def start(config):
    """The device."""
    check(WORLD == 1, f"{SCRIPT}.py runs on one device: start it without torchrun, and unset "
          f"WORLD_SIZE, which is {WORLD}")
    name = config.device.replace("auto", "cuda" if torch.cuda.is_available() else "cpu")
    name = f"cuda:{LOCAL_RANK}" if name == "cuda" else name
    here = ["cpu"] + [f"cuda:{i}" for i in range(torch.cuda.device_count())]
    check(name in here, f"there is no device {name}; here are {', '.join(here)}", alike=False)
    if name != "cpu":
        torch.cuda.set_device(name)
        torch.set_float32_matmul_precision("high")
        torch.backends.cudnn.benchmark = True
    return torch.device(name)

def stages(config):
    """What each epoch of a run belongs to: split (0: pre-training), number in it, its settings."""
    tuning = replace(config, epochs=config.tune_epochs, batch_size=config.tune_batch_size,
                     lr=config.tune_lr)
    parts = [] if config.mode == "supervised" or config.pretrained else [(0, config)]
    parts += [(split, tuning) for split in range(1, config.splits + 1)]
    return [(split, number, settings) for split, settings in parts
            for number in range(1, settings.epochs + 1)]

def begin(config, split, pretrained, device):
    """The networks at the start of a stage, from a pre-trained encoder if any, and an optimiser."""
    method = Method(config, split).to(device, memory_format=torch.channels_last)
    if split and pretrained:
        method.encoder.load_state_dict(pretrained)
    for network in method.children() if config.compile else ():
        network.compile(dynamic=False)  # in place: the names of the parameters stay
    return method, make_optimizer(method, config)

def train(config):
    """Trains what is left of the run of config.out: returns method, data and a dict per epoch."""
    device, out, plan = start(config), Path(config.out), stages(config)
    trained_on = {"precision": precision(config, device)}
    saved = open_run(config, trained_on)
    pretrained = saved["pretrained"] if saved else pretrained_encoder(config)
    try:
        out.mkdir(parents=True, exist_ok=True)
        (out / "config.json").write_text(json.dumps(asdict(config), indent=1))
    except OSError as problem:
        check(False, f"cannot write to {out} ({problem}): choose another --out")
    data = load_data(config, device)  # takes long if labels are to be computed
    log = saved["log"] if saved else [
        {"epoch": 0, "train_seconds": 0.0, "command": " ".join(["python", *sys.argv]),
         "device": "cpu" if device.type == "cpu" else torch.cuda.get_device_name(), "torch":
         str(torch.__version__), "threads": torch.get_num_threads()}]
    done = log[-1]["epoch"]
    torch.manual_seed(config.seed)
    method, optimizer = begin(config, plan[max(done, 1) - 1][0], pretrained, device)
    if saved:
        method.load_state_dict(saved["method"])
        optimizer.load_state_dict(saved["optimizer"])
    saved_at, terminal, told = time.time(), sys.stdout.isatty(), False
    print(f"{out}: {done} of {len(plan)} epochs done")

    for epoch, (split, number, settings) in enumerate(plan[done:], start=done + 1):
        torch.manual_seed(hash((config.seed, epoch)))  # all chance of an epoch follows from this
        if split != method.split:  # a stage begins
            pretrained = pretrained if method.split else method.encoder.state_dict()
            method, optimizer = begin(config, split, pretrained, device)
        steps = len(data[split][0][1]) // settings.batch_size
        total, peak, final = settings.epochs * steps, settings.lr, settings.lr if split else 0.0
        began, sums = time.time(), Counter()
        for step, (images, labels) in enumerate(batches(data[split], settings, epoch, device), 1):
            now = (number - 1) * steps + step - 1
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(now, total, 0, peak, final)
            loss, terms = method(images, labels)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            sums.update({"loss": loss.detach(), **terms})  # a Counter adds
            if step == 1:
                warm = time.time()  # the first step takes longer
            elif terminal or time.time() - warm > 5 and not told:
                left, told = (time.time() - warm) / (step - 1) * (total - now), True
                print(f" step {step} of {steps}, about {timedelta(seconds=round(left))} left"
                      + " (sooner: --quick, --arch small, fewer --epochs)" * (left > 7200),
                      end="\r" if terminal else "\n", flush=True)
        means = {name: value.item() / steps for name, value in sums.items()}
        finite = all(x.isfinite().all() for x in (sums["loss"], *method.parameters()))
        check(finite, f"loss or weights not finite in epoch {epoch}: lower "
              f"--{'tune-' * bool(split)}lr {peak:g}", 1)
        seconds = time.time() - began
        means["images_per_second"] = steps * settings.batch_size / seconds
        if split and (number % config.eval_every == 0 or number == settings.epochs):
            for name, (cells, labels) in zip(("validation_error", "test_error"), data[split][1:]):
                means[name] = 100 * dos_error(predict(method, cells), labels)
        log.append({"epoch": epoch, "train_seconds": log[-1]["train_seconds"] + seconds,
                    "split": split, **means})
        left = timedelta(seconds=round(seconds * (settings.epochs - number)))
        print(f"epoch {epoch}/{len(plan)}, {f'split {split}' if split else 'pre-training'}:",
              *(f" {k} {v:.4g}" for k, v in means.items()), f" {left} left of it", flush=True)
        (out / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in log))
        if epoch == len(plan) or time.time() - saved_at >= 60 * config.save_every:
            write(out / "checkpoint.pt", {
                "script": SCRIPT, "config": asdict(config), "data": trained_on, "log": log,
                "method": method.state_dict(), "optimizer": optimizer.state_dict(),
                "pretrained": pretrained})
            saved_at = time.time()
    return method, data, log

# %% EVALUATE --------------------------------------------------------------------------------------
def dos_error(prediction, target):
    """Relative error of densities of states (N, 400): a fraction, the mean over samples.

    sum |prediction - target| / sum |target| over the points 100 to 399, x from 0.24 to 0.96: below,
    cells hardly differ.
    """
    wrong = (prediction - target)[:, 100:].abs().sum(1)
    return (wrong / target[:, 100:].abs().sum(1)).mean().item()

@torch.no_grad()
@torch.compiler.set_stance("force_eager")  # else --compile would compile again for these sizes
def predict(method, cells):
    """Densities of states (N, 400) of parts of the cells, in eval mode."""
    method.eval()
    predictions = [method.regress(part) for part in cells.split(256)]
    method.train()
    return torch.cat(predictions)

def evaluate(method, data, config, log):
    """The contents of results.json: errors in percent, mean and std over the splits."""
    last = {line["split"]: line for line in log[1:]}  # of every stage
    errors = torch.tensor([line["test_error"] for split, line in last.items() if split])
    cells, labels = data[0][2]
    empty = empty_lattice(labels.device).expand_as(labels)
    results = {"dos_error": errors.mean().item(), "dos_error_std": errors.std(correction=0).item(),
               "dos_error_empty_lattice": 100 * dos_error(empty, labels),
               "dos_error_protocol": f"last epoch, {len(errors)} splits, {len(cells)} test cells",
               "transform_top1": last.get(0, {}).get("transform_top1")}
    results |= {**log[0], **log[-1], "epochs": config.epochs, "seed": config.seed,
                "peak_memory_gb": torch.cuda.max_memory_allocated() / 2 ** 30 or None}
    return {name: round(x, 3) if isinstance(x, float) else x for name, x in results.items()}

# %% MAIN ------------------------------------------------------------------------------------------
def main(argv=None):
    """Runs a command line. Exit codes: 2 bad input, 1 failed run, 130 Ctrl-C."""
    config = parse_args(argv)
    out, results = Path(config.out), Path(config.out, "results.json")
    try:
        if config.mode == "all":
            every_mode(sys.argv[1:] if argv is None else argv, out)
        elif results.exists():
            open_run(config, {})
        else:
            method, data, log = train(config)
            measured = json.dumps(evaluate(method, data, config, log), indent=1)
            write(out / "encoder.pt", method.encoder.cpu().state_dict())
            write(results, measured)
        print(f"{out} is finished, with results.json")
        for name, value in json.loads(results.read_text()).items():
            if name.startswith("dos_error") and "protocol" not in name:
                print(f"  {name:32}{value} %")
        if config.mode != "all":
            print(f"its spectra: python compare.py {out}")
    except KeyboardInterrupt:
        check(False, "stopped; the same command continues from the last checkpoint", 130)
    except torch.OutOfMemoryError:
        check(False, "the GPU's memory is full: use a smaller --batch-size", 1, alike=False)
    except OSError as problem:  # a full disk
        text = str(problem).splitlines()[-1]
        check(False, f"{text}. Mend this, then the same command continues", 1, alike=False)

def every_mode(argv, out):
    """Runs the four modes, each in its folder in out, and writes their errors to results.json."""
    check(not (out / "checkpoint.pt").exists(), f"{out} holds another run: choose another --out")
    results = {}
    for mode in MODES:
        main([*argv, "--mode", mode, "--out", str(out / mode)])
        one = json.loads((out / mode / "results.json").read_text())
        results |= one | {f"dos_error_{mode}{x}": one[f"dos_error{x}"] for x in ("", "_std")}
    write(out / "results.json", json.dumps(results, indent=1))

# %% SOLVER ----------------------------------------------------------------------------------------
POINTS, STEP = 400, 1.2 / 499  # the labels are y at x = 0, STEP, 2 STEP, ...
K_LINE, BANDS, WIDTH = 25, 6, 0.010  # wave vectors in each direction; bands; Gaussian's std in x

def photonic_bands(eps, k, bands, cutoff=4):
    """The lowest TM bands of square unit cells: frequencies (N, K, bands), velocities (..., 2).

    eps: permittivity (N, n, n) on a grid [x][y] over the cell. k: (K, 2), in reciprocal-lattice
    units. Frequencies in 2 pi c / a, group velocities in c, float64. The field E_z = sum_g E_g
    exp(2 pi i (k + g) r) of frequency w obeys, with the Fourier coefficients eps_g of eps,
        |k + g|^2 E_g = w^2 sum_h eps_(g - h) E_h,
    that is |q|^2 E = w^2 L L^+ E with the Cholesky factor L of the matrix eps_(g - h), or, with
    A = L^-1, the Hermitian problem A |q|^2 A^+ v = w^2 v, E = A^+ v. As E^+ eps E = 1, the velocity
    is sum_g (k + g) |E_g|^2 / w (Hellmann-Feynman); 0 where w = 0.
    ValueError: eps not square, or too coarse for plane waves with |g1|, |g2| up to the cutoff.
    """
    n, line = eps.shape[-1], torch.arange(-cutoff, cutoff + 1, device=eps.device)
    if eps.ndim != 3 or eps.shape[1] != n or 4 * cutoff >= n:
        raise ValueError(f"permittivity is (N, n, n) with n > {4 * cutoff}, not {tuple(eps.shape)}")
    g = torch.cartesian_prod(line, line)  # reciprocal lattice vectors (M, 2)
    coefficients = torch.fft.fft2(eps.double()) / n ** 2
    between = (g[:, None] - g) % n  # (M, M, 2)
    L = torch.linalg.cholesky(coefficients[:, between[..., 0], between[..., 1]])  # (N, M, M)
    one = torch.eye(len(g), dtype=L.dtype, device=eps.device)
    A = torch.linalg.solve_triangular(L, one, upper=False)
    q = k.to(eps.device, torch.float64)[:, None] + g  # (K, M, 2)
    H = (A[:, None] * (q * q).sum(2)[:, None]) @ A.mH[:, None]  # (N, K, M, M)
    squares, vectors = torch.linalg.eigh(H)
    frequencies = squares[..., :bands].clamp(min=0).sqrt()
    E = A.mH[:, None] @ vectors[..., :bands]  # (N, K, M, bands)
    flux = (E.abs() ** 2).mT @ q  # (N, K, bands, 2)
    moving = frequencies[..., None] > 1e-6
    return frequencies, torch.where(moving, flux / frequencies[..., None], 0.0)

def wave_vectors():
    """The centers (625, 2) of 25 x 25 squares that fill the Brillouin zone; -k is 624 - index."""
    line = (torch.arange(K_LINE, dtype=torch.float64) + 0.5) / K_LINE - 0.5
    return torch.cartesian_prod(line, line)

def states_below(edges, frequencies, velocities):
    """The share (..., E) of each state's square of wave vectors with frequencies below edges (E,).

    Within its square, a frequency is taken as linear: frequency + velocity . dk (generalised
    Gilat-Raubenheimer method, arXiv:1711.07993). Its distribution is a trapezoid, of half-width
    h |vx| + |vy| below and h ||vx| - |vy|| above, with half the side h of the square.
    """
    h, v = 0.5 / K_LINE, velocities.abs()
    base = (h * v.sum(-1)).clamp(min=1e-9)[..., None]
    top = h * (v[..., 0] - v[..., 1]).abs()[..., None]
    t = edges - frequencies[..., None]  # (..., E)
    ramp = ((base - t.abs()) / (base - top).clamp(min=1e-12)).clamp(0, 1)
    tail = torch.where(t.abs() < top, 0.5 - t.abs() / (base + top),
                       ramp * ramp * (base - top) / (2 * (base + top)))  # beyond |t|, on one side
    return torch.where(t < 0, tail, 1 - tail)

def density_of_states(eps, cutoff=4):
    """y (N, 400), float64: states per cell and unit of x, of permittivities (N, n, n).

    x = frequency sqrt(mean eps), in 2 pi c / a; y(x_j) at x_j = 1.2 j / 499, smoothed by a Gaussian
    of std 0.010, reflected at 0. Without the one state of frequency 0. Invariant under shifts,
    mirrors, turns and eps -> s eps. States at -k are those at k: half of the wave vectors suffice.
    """
    k = wave_vectors()[:K_LINE ** 2 // 2 + 1]  # the last is 0
    frequencies, velocities = photonic_bands(eps, k, BANDS, cutoff)
    frequencies[:, -1, 0] = torch.inf
    root = eps.double().mean((1, 2)).sqrt()[:, None, None]
    weights = torch.full((len(k), 1), 2 / K_LINE ** 2, dtype=torch.float64, device=eps.device)
    weights[-1] /= 2
    edges = torch.arange(701, dtype=torch.float64, device=eps.device) * 0.0015  # nine stds beyond x
    below = states_below(edges, root * frequencies, root[..., None] * velocities)
    counts = (weights[..., None] * below).sum((1, 2)).diff(dim=1)  # (N, 700)
    centers = (edges[1:] + edges[:-1]) / 2
    x = torch.arange(POINTS, dtype=torch.float64, device=eps.device) * STEP
    gauss = sum(torch.exp(-((x - s * centers[:, None]) / WIDTH) ** 2 / 2) for s in (1, -1))
    return counts @ gauss / (WIDTH * (2 * math.pi) ** 0.5)

if __name__ == "__main__":
    main()
