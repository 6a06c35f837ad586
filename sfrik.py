"""SFRIK: self-supervised learning with kernels that spread the embeddings over the sphere.

L. Zheng, G. Puy, E. Riccietti, P. Perez, R. Gribonval, "Self-supervised learning with
rotation-invariant kernels" (SFRIK), ICLR 2023, arXiv:2208.00789.

Two views of an image should have similar embeddings, and the embeddings of a batch should be spread
evenly over the unit sphere in R^q, so that they do not all become equal. How uneven they are is
measured by their maximum mean discrepancy (MMD) to the uniform distribution, for a kernel that
rotations of the sphere do not change: K(u, v) = sum of b_l P_l(q; u.v) over l = 1, ..., L, with
weights b_l >= 0 and Legendre polynomials P_l of dimension q; L is 2 or 3. For every v the mean of
K(u, v) over all u of the sphere is 0, so the squared MMD is the mean of K over pairs of embeddings.

Algorithm, for a batch x of N images, backbone f and projector g, whose outputs get length 1:
  1. draw two random views t1(x), t2(x) of every image; z1 = g(f(t1(x))), z2 = g(f(t2(x)));
  2. L_inv = mean over the images of |z1_i - z2_i|^2;
  3. L_reg(z) = mean over all pairs i, j of K(z_i, z_j), the squared MMD of a view;
  4. step f and g on L_inv + lam (L_reg(z1) + L_reg(z2)) / 2.
The loss takes time O(q N^2) and memory O(N^2); VICReg's, for its q x q covariance, O(q^2 N) and
O(q^2).

Usage
  python sfrik.py --quick                            built-in data, two minutes on a CPU
  python sfrik.py                                    CIFAR-10, on one GPU
  python sfrik.py --loss vicreg                      a baseline: simclr, auh or vicreg
  python sfrik.py --validate --lam 1                 tested on held-out images, to choose settings
  python sfrik.py --dataset folder --data-root PATH  your images, decoded by prepare.py
  torchrun --nproc_per_node=4 sfrik.py --dataset imagenet20 --data-root PATH
  (PATH holds 20 % of ImageNet: python prepare.py IMAGENET --per-class 260 --out PATH)

Differences from the authors' slides and code that change numbers (the body of the paper was not at
hand; more: results/README.md):
  - As in the code, the loss is step 4's divided by lam. So L_inv / q, the mean over all N q squared
    differences, has the weight q / lam. The code sets this weight (4000 for q = 8192), we set lam.
  - Only the b_l of L = 3 are published, and the baselines' settings only for 20 % of ImageNet (AUH:
    q / lam = 3000 for q = 8192). The settings for CIFAR, patterns and folders are ours; on patterns
    and all of ImageNet the baselines have SFRIK's rate and lam (ours).
  - Views are bilinear (code: bicubic) and computed in floating point; a batch shares one order of
    the colour operations. On a GPU the networks run in bfloat16 and matrix products in TF32.
  - The code keeps the probe's best epoch, here the last counts. For 1 and 10 % of the labels the
    code fine-tunes the network; here a probe is trained. The slides' SVMs learn from VOC07, here
    from the run's data (up to 100,000 images).
  - Photographs are decoded once, to a middle square, and the views are cropped from that.
"""
import io
import json
import math
import os
import signal
import sys
import time
import warnings
import zlib
from argparse import SUPPRESS, ArgumentParser
from dataclasses import asdict, dataclass, field, fields
from datetime import timedelta
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F
import torchvision.transforms.functional as TF
from PIL import ImageOps
from torchvision import datasets, models
from torchvision.utils import save_image

SCRIPT = "sfrik"
WORLD = int(os.environ.get("WORLD_SIZE") or 1)  # number of processes; torchrun sets it
RANK = int(os.environ.get("RANK", 0)) if WORLD > 1 else 0  # number of this process, from 0
LOCAL_RANK = int(os.environ.get("LOCAL_RANK", 0)) if WORLD > 1 else 0  # the same, on its machine

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
    """Our CIFAR-10 run, with the authors' kernel. BASELINES and PRESETS have what others change."""
    dataset: str = option("cifar10", "what to train on (folder: your own images)",
                          "cifar10 cifar100 stl10 folder imagenet20 imagenet patterns")
    data_root: str = option("data", "folder that holds the dataset, or to download it to")
    limit: int = option(0, "train on this many images, the same every time (0: all)")
    validate: bool = option(False, "test on training images that are held out: a tenth, or of "
                                   "imagenet20 all but the first 260 of each class (photographs "
                                   "are copied to memory)")
    size: int = option(32, "side of the views, in pixels")
    loss: str = option("sfrik", "SFRIK's loss, or a baseline's (auh: alignment and uniformity)",
                       "sfrik simclr auh vicreg")
    weights: str = option("1,40,40", "weights b_1, ..., b_L of the kernel (for L = 2: 1,40)")
    lam: float = option(8192 / 4000, "weight of L_reg, or of AUH's uniformity, over that of L_inv")
    sim_coeff: float = option(10.0, "weight of VICReg's similarity term (SFRIK, AUH: q / lam)")
    std_coeff: float = option(10.0, "weight of VICReg's variance term")
    cov_coeff: float = option(1.0, "weight of VICReg's covariance term")
    auh_scale: float = option(2.5, "s of AUH's kernel exp(-s |u - v|^2)")
    temperature: float = option(0.15, "temperature of SimCLR's loss")
    projector: str = option("2048-2048-2048", "widths of the projector's layers; the last is q")
    arch: str = option("resnet18", "backbone", "resnet18 resnet50 small")
    epochs: int = option(400, "passes over the training images")
    batch_size: int = option(512, "images per step, over all processes")
    optimizer: str = option("lars", "optimizer", "lars sgd")
    lr: float = option(1.2, "peak learning rate per 256 images of the batch")
    final_lr: float = option(0.001, "learning rate at the end, as a share of the peak")
    warmup_epochs: int = option(10, "epochs of linear warm-up, at most epochs / 4 unless given")
    weight_decay: float = option(1e-6, "weight decay (lars: not of biases and BatchNorm)")
    seed: int = option(0, "random seed of the weights, the batches and the views")
    knn_every: int = option(10, "epochs between kNN evaluations (0: only at the end)")
    save_every: float = option(5.0, "minutes between checkpoints, written when an epoch ends")
    device: str = option("auto", "cpu, cuda or cuda:1 (auto: cuda if there is one)")
    precision: str = option("auto", "precision of the networks (auto: bf16 if the GPU has it)",
                            "auto bf16 fp32")
    compile: bool = option(False, "use torch.compile, unless there are several processes")
    out: str = option("", "folder for the results (empty: in runs/, named after the flags)")
    quick: bool = option(False, "small network and built-in data: two minutes on a CPU")

# what baselines change: the authors' values for 20 % of ImageNet
BASELINES = {"simclr": dict(lr=0.8), "auh": dict(lr=1.0, lam=8192 / 3000), "vicreg": dict(lr=0.7)}
PRESETS = {  # what datasets change, whatever the loss
    "stl10": dict(size=64, epochs=100, batch_size=2048, projector="8192-8192-8192"),
    "folder": dict(size=224, epochs=100, batch_size=256),  # ours
    "imagenet20": dict(size=224, epochs=100, batch_size=2048, knn_every=0,
                       projector="8192-8192-8192"),
    "imagenet": dict(arch="resnet50", size=224, epochs=200, batch_size=2048, lr=0.4,
                     lam=32768 / 40000, knn_every=0, projector="8192-8192-32768"),
    "patterns": dict(arch="small", epochs=100, batch_size=256, optimizer="sgd", lr=0.03, lam=0.5,
                     warmup_epochs=3, weight_decay=5e-4, projector="1024-1024-1024"),  # ours
}
# --quick --dataset cifar10 has these settings, too: hence the limit
QUICK = PRESETS["patterns"] | dict(dataset="patterns", epochs=12, knn_every=2, limit=4000)
# what may change when a run is continued
FREE = ("data_root", "out", "device", "compile", "save_every", "knn_every")
PHOTOS = ("folder", "imagenet20", "imagenet")  # photographs, decoded by prepare.py

def stop(message):
    """Ends the program with one line."""
    raise SystemExit(f"error: {message}")

# %% METHOD ----------------------------------------------------------------------------------------
# augment is defined in AUGMENT, the networks in MODEL, gather (for several processes) in TRAIN.
def legendre(degree, q, t):
    """P_l(q; t), the Legendre polynomial of degree l >= 1 in dimension q, of every number in t.

    P_0 = 1, P_1 = t, (k + q - 2) P_(k+1) = (2 k + q - 2) t P_k - k P_(k-1). So P_l is 1 for t = 1,
    and P_2 = (q t^2 - 1) / (q - 1), P_3 = ((q + 2) t^3 - 3 t) / (q - 1), as on the slides.
    """
    previous, P = torch.ones_like(t), t  # P_(k-1) and P_k for k = 1
    for k in range(1, degree):
        previous, P = P, ((2 * k + q - 2) * t * P - k * previous) / (k + q - 2)
    return P

def mean_kernel(z, weights):
    """L_reg: mean of K(z_i, z_j) over all pairs of rows of z (N, q), also i = j, of length 1.

    K is the kernel in this file's docstring; the weights are its b_1, ..., b_L.
    """
    q = z.shape[1]
    t = z @ z.T  # (N, N): the cosines z_i.z_j
    mean = 0
    for l, b in enumerate(weights, start=1):
        mean = mean + b * legendre(l, q, t).mean()
    return mean

def sfrik_loss(z1, z2, lam, weights):
    """SFRIK's loss of the embeddings (N, q) of two views: that of step 4, divided by lam."""
    z1, z2 = F.normalize(z1), F.normalize(z2)
    q = z1.shape[1]
    L_reg = (mean_kernel(z1, weights) + mean_kernel(z2, weights)) / 2
    return q / lam * F.mse_loss(z1, z2) + L_reg  # F.mse_loss, a mean over all numbers: L_inv / q

def auh_loss(z1, z2, lam, scale):
    """AUH: alignment and uniformity on the hypersphere, of the embeddings (N, q) of two views.

    L_inv / lam + uniformity, the logarithm of the mean of exp(-scale |z_i - z_j|^2) over all pairs
    i != j of a view; then the mean over both views.
    """
    z1, z2 = F.normalize(z1), F.normalize(z2)
    n, q = z1.shape
    loss = q / lam * F.mse_loss(z1, z2)
    for z in (z1, z2):
        # (N, N): |z_i - z_j|^2 = 2 - 2 z_i.z_j; infinite for i = j, so that exp is 0 there
        squared = (2 - 2 * z @ z.T).fill_diagonal_(torch.inf)
        mean = (-scale * squared).exp().sum() / (n * (n - 1))
        loss = loss + mean.log() / 2
    return loss

def vicreg_loss(z1, z2, sim_coeff, std_coeff, cov_coeff):
    """VICReg's loss of the embeddings (N, q) of two views, which it does not normalise.

    Each coordinate should have a standard deviation of at least 1, each two a covariance of 0. As
    in its code, the variance term is averaged over the views, the covariance term summed.
    """
    loss = sim_coeff * F.mse_loss(z1, z2)
    for z in (z1, z2):
        n, q = z.shape
        z = z - z.mean(0)
        std = (z.var(0) + 1e-4).sqrt()  # (q,)
        covariance = z.T @ z / (n - 1)  # (q, q)
        # the sum of the squares off the diagonal
        squares = covariance.square().sum() - covariance.diagonal().square().sum()
        loss = loss + std_coeff * F.relu(1 - std).mean() / 2 + cov_coeff * squares / q
    return loss

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

class Method(nn.Module):
    """SFRIK or a baseline: uint8 images (N, 3, H, W) to its loss and to terms for the log."""

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.weights = [float(b) for b in config.weights.split(",")]
        # for STL-10 the authors keep ImageNet's stem, though views have 64 pixels
        stem_size = 224 if config.dataset == "stl10" else config.size
        self.encoder, width = make_encoder(config.arch, stem_size)
        self.projector = make_projector(config, width)
        self.view1, self.view2 = view_arguments(config)
        mean, std = MEAN_STD[config.dataset]  # constants, so not saved
        self.register_buffer("mean", torch.tensor(mean).view(3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(std).view(3, 1, 1), persistent=False)

    def forward(self, images):
        x1, x2 = self.views(images)  # (N, 3, S, S)
        z1 = gather(self.embed(x1))  # (WORLD N, q): those of all processes
        z2 = gather(self.embed(x2))
        if self.config.loss == "sfrik":
            loss = sfrik_loss(z1, z2, self.config.lam, self.weights)
        else:
            loss = self.baseline_loss(z1, z2)
        return loss, log_terms(z1, z2, self.weights)

    def baseline_loss(self, z1, z2):
        """The loss of another method on the embeddings (N, q) of two views."""
        config = self.config
        if config.loss == "simclr":
            return nt_xent(z1, z2, config.temperature)
        if config.loss == "auh":
            return auh_loss(z1, z2, config.lam, config.auh_scale)
        return vicreg_loss(z1, z2, config.sim_coeff, config.std_coeff, config.cov_coeff)

    def views(self, images):
        """Two views (N, 3, S, S) of the images, in [0, 1]."""
        return augment(images, **self.view1), augment(images, **self.view2)

    def features(self, x):
        """Features (N, D), float32, of images in [0, 1]."""
        bf16 = self.config.precision == "bf16"
        with torch.autocast(x.device.type, torch.bfloat16, enabled=bf16):
            return self.encoder((x - self.mean) / self.std).float()

    def embed(self, x):
        """Embeddings (N, q), float32, of images in [0, 1]; encoder and projector in --precision."""
        bf16 = self.config.precision == "bf16"
        with torch.autocast(x.device.type, torch.bfloat16, enabled=bf16):
            return self.projector(self.features(x)).float()

@torch.no_grad()
def log_terms(z1, z2, weights):
    """For the log: distance is L_inv, std is spread(z1), mmd is L_reg(z1) over pairs i != j only.

    mmd is taken from 256 rows. For uniform embeddings it is near 0, and can be negative.
    """
    z = F.normalize(z1[:256].double())  # double, since nearly equal numbers are subtracted
    n = len(z)
    # K(z_i, z_i) = sum(weights), so this is (n^2 L_reg - n sum(weights)) / (n^2 - n)
    mmd = (n * mean_kernel(z, weights) - sum(weights)) / (n - 1)
    distance = (F.normalize(z1) - F.normalize(z2)).square().sum(1).mean()
    return {"distance": distance, "mmd": mmd, "std": spread(z1)}

def spread(z):
    """Standard deviation of the normalised embeddings (N, D) times sqrt(D).

    1 if they are spread evenly over the sphere, 0 if they collapse.
    """
    return F.normalize(z.detach()).std(0).mean() * z.shape[1] ** 0.5

# %% AUGMENT ---------------------------------------------------------------------------------------
def view_arguments(config):
    """Arguments of augment for the two views.

    As in the authors' code, photographs get VICReg's augmentation, STL-10 gets AUH's. Other images
    get that of photographs, but with larger crops and no blur (ours).
    """
    if config.dataset == "stl10":
        view = dict(size=config.size, scale=(0.08, 1.0), jitter=(0.4, 0.4, 0.4, 0.4), jitter_p=1.0)
        return view, view
    view1 = dict(size=config.size, jitter=(0.4, 0.4, 0.2, 0.1))
    view2 = dict(view1, solarize=0.2)
    if config.dataset in PHOTOS:
        view1 = dict(view1, scale=(0.08, 1.0), blur=1.0)
        view2 = dict(view2, scale=(0.08, 1.0), blur=0.1)
    return view1, view2

@torch.no_grad()
def augment(images, size, scale=(0.2, 1.0), flip=0.5, jitter=(0.4, 0.4, 0.4, 0.1), gray=0.2,
            blur=0, solarize=0, jitter_p=0.8):
    """Random views (N, 3, size, size) in [0, 1] of images (N, 3, H, W), uint8 or in [0, 1].

    scale: smallest and largest share of the area that a crop keeps. jitter: the largest change of
    brightness, contrast, saturation and hue (1: a full turn), with the probability jitter_p.
    flip, gray, blur and solarize are probabilities, too.
    """
    n, _, height, width = images.shape
    x = TF.convert_image_dtype(images)  # uint8 to [0, 1]

    def uniform(low, high, draws=1):
        return x.new_empty(n, draws, 1, 1).uniform_(low, high)

    def chosen(probability):
        return uniform(0, 1) < probability

    x = crop(x, draw_boxes(uniform, height, width, scale), size)
    x = torch.where(chosen(flip), x.flip(3), x)
    if jitter:
        operations = [brightness, contrast, saturation, shift_hue]
        jittered = chosen(jitter_p)
        for i in torch.randperm(4).tolist():  # one order for the batch
            change = jittered * uniform(-jitter[i], jitter[i])  # 0 if not jittered
            x = operations[i](x, change)
    if gray:
        x = torch.where(chosen(gray), TF.rgb_to_grayscale(x, 3), x)
    if blur:
        x = torch.where(chosen(blur), gaussian_blur(x, uniform(0.1, 2.0)), x)
    if solarize:
        x = torch.where(chosen(solarize) & (x >= 128 / 255), 1 - x, x)
    return x

def draw_boxes(uniform, height, width, scale):
    """Boxes (N, 4) of top, left, height, width, drawn as by torchvision's RandomResizedCrop.

    Of ten random boxes the first that fits into the image is taken. If none fits, which is rare,
    the first is cut to the image (torchvision: the middle of the image). uniform(low, high, draws)
    returns random numbers (N, draws, 1, 1).
    """
    area = height * width * uniform(*scale, 10)  # (N, 10, 1, 1)
    ratio = uniform(math.log(3 / 4), math.log(4 / 3), 10).exp()
    h = (area / ratio).sqrt().round()
    w = (area * ratio).sqrt().round()
    fits = (h <= height) & (w <= width)
    first = fits.byte().argmax(1, keepdim=True)  # (N, 1, 1, 1): index of the first 1, 0 if none
    h = h.gather(1, first).clamp(max=height)
    w = w.gather(1, first).clamp(max=width)
    top = (uniform(0, 1) * (height - h + 1)).floor()
    left = (uniform(0, 1) * (width - w + 1)).floor()
    return torch.cat([top, left, h, w], dim=1).flatten(1)

def crop(x, boxes, size):
    """The boxes (N, 4) cut out of x and resized, bilinear and antialiased: (N, 3, size, size).

    A new pixel is a weighted mean of old ones. First the width becomes `size`, then the height,
    each by a product with a small matrix of weights.
    """
    top, left, height, width = boxes[..., None, None].split(1, dim=1)  # (N, 1, 1, 1) each
    vertical = resizing_matrix(top, height, x.shape[2], size)  # (N, 1, size, H)
    horizontal = resizing_matrix(left, width, x.shape[3], size)  # (N, 1, size, W)
    x = x @ horizontal.mT  # (N, 3, H, size); mT swaps the last two dimensions
    return vertical @ x  # (N, 3, size, size)

def resizing_matrix(start, length, source, size):
    """Weights (N, 1, size, source): row i says how much each old pixel counts in new pixel i.

    The box begins at `start` and has `length` old pixels, (N, 1, 1, 1) each. Bilinear: a weight
    falls linearly with the distance of the two centres, to 0 at `reach`. This is one old pixel if
    the box is enlarged, and one new, larger pixel if it is shrunk, to prevent aliasing.
    """
    # the centres, in old pixels from the start of the box: (N, 1, size, 1) and (N, 1, 1, source)
    new = (torch.arange(size, device=start.device)[:, None] + 0.5) * length / size
    old = torch.arange(source, device=start.device) + 0.5 - start
    reach = (length / size).clamp(min=1)
    weight = (1 - (old - new).abs() / reach).clamp(min=0)
    weight = weight * ((old > 0) & (old < length))  # nothing from outside of the box
    return weight / weight.sum(3, keepdim=True)

def brightness(x, change):
    """Brighter by a change (N, 1, 1, 1): 0 leaves x as it is, -1 makes it black."""
    return (x * (1 + change)).clamp_(0, 1)

def contrast(x, change):
    """Moves x away from the mean of its gray version by a change: -1 leaves only the mean."""
    mean = TF.rgb_to_grayscale(x).mean((2, 3), keepdim=True)
    return torch.lerp(mean, x, 1 + change).clamp_(0, 1)

def saturation(x, change):
    """Moves x away from its gray version by a change: -1 leaves only the gray version."""
    return torch.lerp(TF.rgb_to_grayscale(x), x, 1 + change).clamp_(0, 1)

def shift_hue(x, turns):
    """Moves the hue by turns (N, 1, 1, 1): each image by its own, unlike TF.adjust_hue."""
    red, green, blue = x.split(1, dim=1)
    value = x.amax(1, keepdim=True)
    chroma = value - x.amin(1, keepdim=True)
    safe = torch.where(chroma > 0, chroma, 1.0)  # gray has chroma 0, and divides by 1
    # hue in sixths of a turn, 0 red, 2 green, 4 blue, by the channel that is largest
    hue = (red - green) / safe + 4
    hue = torch.where(value == green, (blue - red) / safe + 2, hue)
    hue = torch.where(value == red, (green - blue) / safe, hue)
    # from HSV to RGB: with k = hue + (5, 3, 1) modulo 6 for red, green and blue, a channel is
    # value - chroma * min(k, 4 - k), the minimum clamped to [0, 1]
    offset = torch.arange(5, 0, -2, device=x.device).view(3, 1, 1)
    k = (hue + 6 * turns + offset).remainder_(6)
    return value - chroma * torch.minimum(k, 4 - k).clamp_(0, 1)

def gaussian_blur(x, sigma, radius=6):
    """Gaussian blur of sigma (N, 1, 1, 1) pixels, cut off at the radius, over mirrored borders."""
    distance = torch.arange(-radius, radius + 1, device=x.device)
    kernel = torch.exp(-0.5 * (distance / sigma) ** 2)  # (N, 1, 1, 2 radius + 1)
    kernel = kernel / kernel.sum(3, keepdim=True)
    kernel = kernel.repeat_interleave(3, dim=0)  # (3N, 1, 1, 2 radius + 1)
    # the batch counts as one image of 3N channels; by groups, each has its own kernel, which blurs
    # first along the rows, then along the columns
    x = F.pad(x, [radius] * 4, mode="reflect").flatten(0, 1)  # (3N, H + 2 radius, ...)
    x = F.conv2d(x, kernel, groups=len(kernel))
    x = F.conv2d(x, kernel.mT, groups=len(kernel))
    return x.unflatten(0, (-1, 3))

# %% MODEL -----------------------------------------------------------------------------------------
def make_encoder(arch, size):
    """The backbone, from images (N, 3, H, W) to features (N, D), and D."""
    if arch == "small":
        layers = []
        for inputs, outputs in pairwise((3, 16, 32, 64, 128)):
            layers += [nn.Conv2d(inputs, outputs, 3, padding=1, bias=False),
                       nn.BatchNorm2d(outputs), nn.ReLU(), nn.MaxPool2d(2)]
        layers[-1] = nn.AdaptiveAvgPool2d(1)  # in place of the last max-pool
        return nn.Sequential(*layers, nn.Flatten()), 128
    # for photographs residual branches start at zero, as in the authors' code for ImageNet
    encoder = models.get_model(arch, zero_init_residual=size > 64)
    width = encoder.fc.in_features
    encoder.fc = nn.Identity()
    if size <= 64:  # small images: a 3x3 stem without max-pool, with torchvision's initialisation
        encoder.conv1 = nn.Conv2d(3, 64, 3, padding=1, bias=False)
        nn.init.kaiming_normal_(encoder.conv1.weight, mode="fan_out", nonlinearity="relu")
        encoder.maxpool = nn.Identity()
    return encoder, width

def make_projector(config, width):
    """The projector: linear layers, each but the last with bias, BatchNorm and ReLU."""
    layers = []
    *hidden, q = map(int, config.projector.split("-"))
    for outputs in hidden:
        layers += [nn.Linear(width, outputs), nn.BatchNorm1d(outputs), nn.ReLU()]
        width = outputs
    return nn.Sequential(*layers, nn.Linear(width, q, bias=False))

# %% DATA ------------------------------------------------------------------------------------------
# mean and standard deviation of the channels; of STL-10 and ImageNet as in the authors' code
CIFAR = ((0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010))
IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
MEAN_STD = {"cifar10": CIFAR, "cifar100": CIFAR, "folder": IMAGENET, "imagenet20": IMAGENET,
            "imagenet": IMAGENET, "stl10": ((0.441, 0.428, 0.387), (0.268, 0.261, 0.269)),
            "patterns": ((0.4, 0.4, 0.4), (0.25, 0.25, 0.25))}

def load_data(config, device):
    """train, bank, test: (images, labels) to train on, to learn kNN and the probe from, to test on.

    Images are uint8 (N, 3, H, W). Only for STL-10 do train and bank differ. bank and test are None
    if there is nothing to evaluate.
    """
    root = Path(config.data_root)
    unlabelled = None  # STL-10 trains on images without labels
    if config.dataset == "patterns":
        bank, test = draw_patterns(4000, seed=1), draw_patterns(1000, seed=2)
    elif config.dataset in PHOTOS:
        bank, test = load_photos(root, "train"), load_photos(root, "val")
    elif config.dataset == "stl10":
        unlabelled, bank, test = load_stl10(root)
    else:
        bank, test = load_cifar(root, config)
    rows, held_out = split_rows(bank[1], config)
    if config.validate:
        if len(held_out) == 0:
            stop("no class has images to hold out: imagenet20 needs 261 of a class, other "
                 "datasets 10")
        test = choose(bank, held_out)
    if config.limit:
        rows = rows[random_rows(len(rows), config.limit)]
    bank = place(choose(bank, rows), device)
    train = bank
    if unlabelled:
        if config.limit:
            unlabelled = choose(unlabelled, random_rows(len(unlabelled[1]), config.limit))
        train = place(unlabelled, device)
    if len(train[1]) < config.batch_size:
        stop(f"--batch-size {config.batch_size} is more than the {len(train[1])} images: try a "
             "quarter of their number")
    if len(test[1]) == 0 or int(bank[1].max()) == 0:
        print("no evaluation: it needs test images (val/), and two or more classes")
        return train, None, None
    return train, bank, place(test, device)

def split_rows(labels, config):
    """Rows of the images to train on, and of those held out, both in the order of the data.

    imagenet20 trains on the first 260 images of each class and holds out all others. Other datasets
    hold out nothing or, with --validate, the last tenth of each class.
    """
    train, held_out = [], []
    for rows in rows_of_classes(labels):
        count = len(rows)
        if config.dataset == "imagenet20":
            count = 260
        elif config.validate:
            count -= len(rows) // 10
        train.append(rows[:count])
        held_out.append(rows[count:])
    return torch.cat(train).sort().values, torch.cat(held_out).sort().values

def rows_of_classes(labels):
    """For each class the rows of its images, in the file's order."""
    return [(labels == label).nonzero()[:, 0] for label in labels.unique()]

def choose(data, rows):
    """These rows of images and labels; not copied if they are all rows, which may exceed memory."""
    images, labels = data
    if len(rows) == len(labels):
        return data
    return images[rows], labels[rows]

def load_cifar(root, config):
    """Training and test images and labels of CIFAR-10 or CIFAR-100."""
    cifar = datasets.CIFAR10 if config.dataset == "cifar10" else datasets.CIFAR100
    try:
        splits = [cifar(root, train=train, download=True) for train in (True, False)]
    except (OSError, RuntimeError) as problem:
        folder = root / cifar.base_folder
        state = "is damaged" if folder.exists() else "is missing"
        stop(f"{folder} {state} and cannot be downloaded ({problem}); --quick needs no data")
    return [(torch.tensor(split.data).permute(0, 3, 1, 2).contiguous(),
             torch.tensor(split.targets)) for split in splits]

def load_stl10(root):
    """Images (N, 3, 96, 96) and labels of STL-10: without labels (all -1), with labels, to test."""
    parts = ("unlabeled", "train", "test")
    try:
        splits = [datasets.STL10(root, part, download=True) for part in parts]
    except (OSError, RuntimeError) as problem:
        folder = root / datasets.STL10.base_folder
        state = "is damaged" if folder.exists() else "is missing"
        stop(f"{folder} {state} and cannot be downloaded ({problem}); --quick needs no data")
    return [(torch.tensor(split.data), torch.tensor(split.labels, dtype=torch.int64))
            for split in splits]

def load_photos(root, split):
    """Images and labels of a split that prepare.py wrote; the images may be larger than memory."""
    try:  # mapped into memory: a row is read from the disk when it is used
        images = np.load(root / f"{split}-images.npy", mmap_mode="r")
        labels = np.load(root / f"{split}-labels.npy")
    except (OSError, ValueError, EOFError) as problem:
        stop(f"{problem}; first run: python prepare.py YOUR_IMAGES --out {root}")
    if images.dtype != np.uint8 or images.ndim != 4 or images.shape[1] != 3:
        stop(f"{split}-images.npy must be uint8 (N, 3, H, W), not {images.dtype} {images.shape}")
    integers = np.issubdtype(labels.dtype, np.integer)
    if not integers or labels.shape != images.shape[:1] or (labels < 0).any():
        stop(f"{split}-labels.npy must be {len(images)} classes: integers from 0")
    with warnings.catch_warnings(action="ignore"):  # torch warns that it could not write to the map
        images = torch.from_numpy(images)
    return images, torch.tensor(labels, dtype=torch.int64)

def place(data, device):
    """Labels on the device; images, too, if they take less than a quarter of its free memory."""
    images, labels = data
    if device.type == "cpu" or images.nbytes < torch.cuda.mem_get_info(device)[0] / 4:
        images = images.to(device)
    return images, labels.to(device)

def take(images, rows, device):
    """The images of these rows, on the device."""
    batch = images[rows]
    if batch.device.type == device.type:
        return batch
    return batch.pin_memory().to(device, non_blocking=True)  # the CPU does not wait for the copy

def random_rows(n, count):
    """The first `count` of n indices in a random order that is always the same."""
    return torch.randperm(n, generator=torch.Generator().manual_seed(0))[:count]

def draw_patterns(n, seed):
    """Built-in data: uint8 images (n, 3, 32, 32) and labels (n,).

    A class is a periodic pattern, a sum of waves, seen at a random zoom, tilt, place and light.
    """
    # a wave (i, j) has i periods across the image and j down; (-i, -j) would be the same wave
    waves = [(i, j) for i in range(-2, 3) for j in range(3) if j > 0 or i > 0]
    # a class is one random phase for every wave: (waves, classes)
    phases = math.tau * torch.rand(len(waves), 10, generator=torch.Generator().manual_seed(0))
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(10, (n,), generator=generator)
    zoom, tilt, light, shift_x, shift_y = torch.rand(5, n, 1, 1, generator=generator)  # (n, 1, 1)
    zoom = 1.2 + zoom
    tilt = (2 * tilt - 1) * math.radians(20)
    light = math.tau * light  # the direction it comes from
    x = (torch.arange(32) - 15.5) / 32  # of the columns (32,)
    y = x[:, None]  # of the rows (32, 1)
    # (u, v) is the point of the pattern that the pixel (x, y) shows: (n, 32, 32) each
    u = zoom * (tilt.cos() * x - tilt.sin() * y) + shift_x
    v = zoom * (tilt.sin() * x + tilt.cos() * y) + shift_y
    pattern = 0
    for (i, j), phase in zip(waves, phases):
        # phase[labels, None, None] (n, 1, 1): the phase of this wave in the class of each image
        wave = torch.cos(math.tau * (i * u + j * v) + phase[labels, None, None])
        pattern = pattern + wave / (i * i + j * j)  # finer waves are weaker
    tone = 0.1 + 0.6 * torch.sigmoid(6 * pattern / pattern.std())
    lit = tone * (1 + 0.6 * (light.cos() * x + light.sin() * y))  # brighter towards the light
    tint = 0.98 + 0.04 * torch.rand(n, 3, 1, 1, generator=generator)
    noise = 0.02 * torch.randn(n, 3, 32, 32, generator=generator)
    images = (lit[:, None] * tint + noise).clamp(0, 1)
    return (255 * images).byte(), labels

# %% TRAIN -----------------------------------------------------------------------------------------
def gather(z):
    """Embeddings (N, D) of all processes: (WORLD N, D). This process's own have a gradient."""
    if WORLD == 1:
        return z
    values = z.detach()
    parts = [torch.empty_like(z) for _ in range(WORLD)]
    dist.all_gather(parts, values)
    # all_gather passes no gradient on. z - values is 0, but brings back this process's gradient,
    # times WORLD, since DistributedDataParallel divides the sum over the processes by WORLD.
    parts[RANK] = values + WORLD * (z - values)
    return torch.cat(parts)

def learning_rate(step, total_steps, warmup_steps, peak, final=0.0):
    """Linear from 0 to peak at warmup_steps, then a cosine to final at total_steps."""
    if step < warmup_steps:
        return peak * step / warmup_steps
    if step >= total_steps:
        return final
    progress = (step - warmup_steps) / (total_steps - warmup_steps)
    return final + (peak - final) * (1 + math.cos(math.pi * progress)) / 2

class LARS(torch.optim.SGD):
    """SGD that decays weight matrices p and scales their gradients g by 0.001 |p| / |g|."""

    def __init__(self, parameters, lr, weight_decay=0.0):
        super().__init__(parameters, lr, momentum=0.9)
        self.decay = weight_decay

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            for p in group["params"]:
                if p.ndim > 1:
                    p.grad.add_(p, alpha=self.decay)
                    trust = 0.001 * p.norm() / p.grad.norm()
                    p.grad.mul_(torch.where((trust > 0) & trust.isfinite(), trust, 1.0))
        super().step()

def make_optimizer(method, config):
    """LARS or SGD at the peak rate; train_epoch sets the rate of every step."""
    peak = config.lr * config.batch_size / 256
    if config.optimizer == "lars":
        return LARS(method.parameters(), peak, config.weight_decay)
    return torch.optim.SGD(method.parameters(), peak, momentum=0.9,
                           weight_decay=config.weight_decay, fused=method.mean.is_cuda)

def start(config):
    """The device. Writes it and the precision into config, in place of "auto"."""
    if config.device == "auto":
        config.device = "cuda" if torch.cuda.is_available() else "cpu"
    if config.device == "cuda":
        config.device = f"cuda:{LOCAL_RANK}"
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
    if WORLD > 1:
        join_processes(device)
    print(f"on {config.device}, {config.precision}, {torch.get_num_threads()} threads", flush=True)
    return device

def join_processes(device):
    """Waits for the other processes of torchrun. Only the first process prints."""
    if "MASTER_ADDR" not in os.environ:
        stop(f"WORLD_SIZE is {WORLD}: unset it, or start the script with torchrun")
    if RANK > 0:
        sys.stdout = open(os.devnull, "w")
    print(f"waiting for {WORLD} processes", flush=True)
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # otherwise Ctrl-C acts only after the wait
    timeout = timedelta(hours=2)  # the others wait while the first process measures kNN
    if device.type == "cuda":
        dist.init_process_group("nccl", timeout=timeout, device_id=device)
    else:
        dist.init_process_group("gloo", timeout=timeout)
    signal.signal(signal.SIGINT, signal.default_int_handler)  # back to KeyboardInterrupt

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

def batches(images, config, device, epoch):
    """Yields this process's images of every batch of an epoch, in a random order."""
    # all processes draw the same order; the hash of a tuple of integers is the same in every run
    torch.manual_seed(hash((config.seed, epoch)))
    order = torch.randperm(len(images)).to(images.device)
    torch.manual_seed(hash((config.seed, epoch, RANK)))  # of the views, others in each process
    mine = config.batch_size // WORLD
    for step in range(len(images) // config.batch_size):
        first = step * config.batch_size + RANK * mine
        yield take(images, order[first:first + mine], device)

def train_epoch(model, optimizer, images, config, device, epoch):
    """One pass over the images; returns the means of the loss and its terms over the steps."""
    steps, sums = len(images) // config.batch_size, {}
    total, warmup = config.epochs * steps, config.warmup_epochs * steps
    peak = optimizer.defaults["lr"]  # make_optimizer's; the groups' rates change below
    epoch_batches = batches(images, config, device, epoch)
    for step, batch in enumerate(with_progress(epoch_batches, steps, f"epoch {epoch}: step")):
        now = (epoch - 1) * steps + step
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(now, total, warmup, peak, config.final_lr * peak)
        loss, terms = model(batch)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        for name, value in {"loss": loss, **terms}.items():
            sums[name] = sums.get(name, 0) + value.detach()  # .item() would wait for the GPU
    return {name: value.item() / steps for name, value in sums.items()}

def train(config, data, device):
    """Trains the epochs that the run in config.out lacks; returns the method and the log.

    The log is a list of dicts: epoch 0 describes the run, the others the epochs.
    """
    out = Path(config.out)
    (images, _), bank, test = data
    torch.manual_seed(config.seed)
    # channels_last: the order in memory in which convolutions are fastest on a GPU
    method = Method(config).to(device, memory_format=torch.channels_last)
    if WORLD > 1 and device.type == "cuda":
        method = nn.SyncBatchNorm.convert_sync_batchnorm(method)
    optimizer = make_optimizer(method, config)
    log = [{"epoch": 0, "train_seconds": 0.0, "command": " ".join(["python", *sys.argv]),
            "device": torch.cuda.get_device_name() if device.type == "cuda" else "cpu",
            "torch": str(torch.__version__), "threads": torch.get_num_threads(),
            "processes": WORLD}]
    trained_on = describe(images, config)
    saved = open_run(config, trained_on)
    if saved:
        method.load_state_dict(saved["method"])
        optimizer.load_state_dict(saved["optimizer"])
        log = saved["log"]
    elif RANK == 0:
        (out / "config.json").write_text(json.dumps(asdict(config), indent=1))
        draw_views(out / "views.png", method, take(images, random_rows(len(images), 4), device))
    if config.compile and WORLD == 1:
        for network in method.children():
            network.forward = torch.compile(network.forward, dynamic=False)  # keeps weights' names
    model = nn.parallel.DistributedDataParallel(method) if WORLD > 1 else method
    done, saved_at = log[-1]["epoch"], time.time()
    print(f"{out}: {done} of {config.epochs} epochs done", flush=True)

    for epoch in range(done + 1, config.epochs + 1):
        began = time.time()
        means = train_epoch(model, optimizer, images, config, device, epoch)
        finite = all(parameter.isfinite().all() for parameter in method.parameters())
        if not finite or not math.isfinite(means["loss"]):
            stop(f"loss or weights are not finite in epoch {epoch}: lower --lr {config.lr:g}")
        seconds = log[-1]["train_seconds"] + time.time() - began
        if bank and config.knn_every and epoch % config.knn_every == 0 and RANK == 0:
            features, queries = extract(method, bank[0]), extract(method, test[0])
            means["knn_top1"] = knn_accuracy(features, bank[1], queries, test[1])
        log.append({"epoch": epoch, "train_seconds": seconds, **means})
        left = timedelta(seconds=round(seconds / epoch * (config.epochs - epoch)))
        shown = "  ".join(f"{name} {value:.4g}" for name, value in means.items())
        print(f"epoch {epoch}/{config.epochs}  {shown}  {left} left", flush=True)
        if RANK > 0:
            continue
        lines = [json.dumps(line) + "\n" for line in log]
        (out / "metrics.jsonl").write_text("".join(lines))
        if epoch == config.epochs or time.time() - saved_at > 60 * config.save_every:
            (out / "results.json").unlink(missing_ok=True)  # of a run whose checkpoint is gone
            write(out / "checkpoint.pt", {
                "script": SCRIPT, "config": asdict(config), "data": trained_on, "log": log,
                "method": method.state_dict(), "optimizer": optimizer.state_dict()})
            saved_at = time.time()
    return method, log

def describe(images, config):
    """What identifies the training images: a run continues only on the same ones."""
    sample = images[random_rows(len(images), 64)]
    trained_on = {"number of images": len(images),
                  "checksum of 64 images": zlib.crc32(sample.cpu().numpy().tobytes())}
    names = Path(config.data_root) / "classes.json"
    if config.dataset in PHOTOS and names.exists():
        trained_on["class names"] = json.loads(names.read_text())
    return trained_on

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

def draw_views(path, method, images):
    """A row for each image: the image, and the views of it that Method.views returns."""
    columns = [images, *method.views(images)]
    tiles = []
    for row in zip(*columns):
        tiles += [frame(image, "white") for image in row]
    save_image(tiles, path, nrow=len(columns))

def frame(image, color):
    """An image (C, H, W) as a tile of the pictures: 3 channels, 96 pixels wide, with a border."""
    picture = ImageOps.fit(TF.to_pil_image(image).convert("RGB"), (96, 96))
    return TF.to_tensor(ImageOps.expand(picture, 3, color))

# %% EVALUATE --------------------------------------------------------------------------------------
@torch.no_grad()
@torch.compiler.set_stance("force_eager")  # else --compile would compile again for these sizes
def extract(method, images, view=None, rows=None):
    """Features (N, D) of images, or of some rows of them, in eval mode.

    view: a function of images (n, C, H, W) in [0, 1], whose result is encoded (default: middle).
    """
    if rows is None:
        rows = torch.arange(len(images))
    method.eval()
    done, parts = 0, rows.split(256)
    for part in with_progress(parts, len(parts), "features: batch"):
        x = TF.convert_image_dtype(take(images, part, method.mean.device))  # uint8 to [0, 1]
        x = view(x) if view else middle(x, method.config)
        z = method.features(x)
        if done == 0:  # torch.cat of a list of parts would take twice the memory
            features = z.new_empty(len(rows), z.shape[1])
        features[done:done + len(z)] = z
        done += len(z)
    method.train()
    return features

def middle(images, config):
    """Images (N, C, H, W) as evaluation sees them, of side --size; of photographs the middle."""
    height, width = images.shape[2:]
    if config.dataset == "stl10":  # authors' code: whole, of side 96, though the views are smaller
        return images
    if config.dataset in PHOTOS:  # as Resize(256) and CenterCrop(224) do
        images = TF.center_crop(images, [height * 7 // 8, width * 7 // 8])
    return TF.resize(images, [config.size, config.size])

def knn_accuracy(bank, bank_labels, queries, query_labels, k=200, temperature=0.07):
    """Percent of queries (M, D) whose class gets most votes of the k nearest rows of the bank.

    A row votes for its own class with the weight exp(cosine / temperature).
    """
    bank, queries = F.normalize(bank), F.normalize(queries)
    classes = int(bank_labels.max()) + 1
    k = min(k, len(bank))
    right = 0
    for part, labels in zip(queries.split(250), query_labels.split(250)):
        cosines, nearest = (part @ bank.T).topk(k)  # (m, k)
        votes = torch.zeros(len(part), classes, device=part.device)
        # votes[i, class of nearest[i, j]] += exp(cosines[i, j] / temperature)
        votes.scatter_add_(1, bank_labels[nearest], (cosines / temperature).exp())
        right += (votes.argmax(1) == labels).sum().item()
    return 100 * right / len(queries)

def linear_probe(draw_features, labels, z_test, test_labels, lr=0.4, weight_decay=1e-6, epochs=100,
                 probes=3):
    """Mean and standard deviation of the test accuracy, in percent, of linear classifiers.

    draw_features() gives the training features (N, D) of an epoch. The classifiers differ in their
    start and in the order of the images.
    """
    n, classes, device = len(labels), int(labels.max()) + 1, labels.device
    heads = nn.ModuleList(nn.Linear(z_test.shape[1], classes) for _ in range(probes)).to(device)
    optimizer = torch.optim.SGD(heads.parameters(), lr, momentum=0.9, weight_decay=weight_decay)
    steps = max(1, n // 256)  # an incomplete last batch is left out
    for epoch in with_progress(range(epochs), epochs, "linear probe: epoch"):
        features = draw_features()
        shuffled = [torch.randperm(n, device=device).split(256) for _ in heads]
        for step in range(steps):
            now = epoch * steps + step
            optimizer.param_groups[0]["lr"] = learning_rate(now, epochs * steps, 0, lr)
            loss = 0  # summed over the heads; each gets the gradient of its own term
            for head, parts in zip(heads, shuffled):
                rows = parts[step]
                loss += F.cross_entropy(head(features[rows]), labels[rows])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        del features  # before the next are made: those of ImageNet take 10 GB
    correct = [(head(z_test).argmax(1) == test_labels).float().mean() for head in heads]
    accuracies = 100 * torch.stack(correct)
    return accuracies.mean().item(), accuracies.std(correction=0).item()

def probe(method, data, config, z, z_test, percent):
    """The authors' linear probe, trained on a percentage of each class, the same images every time.

    In every epoch it sees fresh crops and flips; with --quick, and for STL-10 as in the authors'
    code, the fixed features z. z and z_test: features (N, D) of training and test images.
    """
    _, (images, labels), (_, test_labels) = data
    chosen = []
    for members in rows_of_classes(labels.cpu()):  # CPU rows can index images on either device
        count = max(1, len(members) * percent // 100)
        chosen.append(members[random_rows(len(members), count)])
    rows = torch.cat(chosen)
    labels = labels[rows]
    if config.quick or config.dataset == "stl10":
        return linear_probe(lambda: z[rows], labels, z_test, test_labels)

    def crop_and_flip(x):
        return augment(x, config.size, scale=(0.08, 1.0), jitter=None, gray=0)

    return linear_probe(lambda: extract(method, images, crop_and_flip, rows), labels, z_test,
                        test_labels)

def linear_svm(x, labels, cost):
    """Weights (D, C) of a linear support vector machine of each class against all others.

    Each column w minimises |w|^2 / 2 + cost * sum_i max(0, 1 - y_i w.x_i)^2 over the rows x_i of
    x (N, D), float64; y_i is 1 for images of the class and -1 for others.
    """
    y = 2 * F.one_hot(labels).to(x) - 1  # (N, C), 1 or -1; .to(x): type and device of x
    # Gradient descent with momentum (Nesterov) and, in place of a learning rate, the inverse of the
    # largest possible second derivative: that where every max(0, ...) is positive.
    largest = torch.eye(x.shape[1]).to(x) + 2 * cost * (x.T @ x)  # (D, D)
    inverse = torch.linalg.inv(largest)
    w = previous = torch.zeros(x.shape[1], y.shape[1]).to(x)
    for _ in range(2000):
        ahead = w + 0.8 * (w - previous)
        gradient = ahead - 2 * cost * (x.T @ (y * F.relu(1 - y * (x @ ahead))))
        previous, w = w, ahead - inverse @ gradient
        if gradient.abs().max() < 1e-7 * cost * len(x):
            break
    return w

def svm_accuracy(train, train_labels, test, test_labels):
    """Accuracy in percent of linear SVMs with the best of nine costs, and that cost.

    The cost is chosen by 3-fold cross-validation, by the number of images classified right. The
    features (N, D) are normalised and get a coordinate 1, whose weight is the intercept. The
    costs are those that the authors' laboratory used for VOC07 (OBoW's code); 10 and 30 are ours.
    """
    train = F.pad(F.normalize(train), (0, 1), value=1.0).double()
    test = F.pad(F.normalize(test), (0, 1), value=1.0).double()
    order = random_rows(len(train), len(train))
    folds = order.to(train.device).chunk(3)
    right = {}
    for cost in (0.05, 0.1, 0.3, 0.5, 1.0, 3.0, 5.0, 10.0, 30.0):
        right[cost] = 0
        for held_out in folds:
            rest = torch.cat([fold for fold in folds if fold is not held_out])
            w = linear_svm(train[rest], train_labels[rest], cost)
            guess = (train[held_out] @ w).argmax(1)
            right[cost] += (guess == train_labels[held_out]).sum().item()
    cost = max(right, key=right.get)  # the one with most right
    guess = (test @ linear_svm(train, train_labels, cost)).argmax(1)
    return 100 * (guess == test_labels).double().mean().item(), cost

def evaluate(method, data, config):
    """Accuracies of the encoder, before and after training. Draws neighbours.png."""
    _, (images, labels), (test_images, test_labels) = data
    results = {
        "knn_protocol": f"k {min(200, len(labels))}, temperature 0.07",
        "linear_protocol": "the authors' probe on fresh crops and flips; before training, for "
                           "STL-10 and with --quick, on fixed features"}
    torch.manual_seed(config.seed)  # as train does: the weights before training
    untrained = Method(config).to(method.mean.device, memory_format=torch.channels_last)
    z, z_test = extract(untrained, images), extract(untrained, test_images)
    results["random_init_knn_top1"] = knn_accuracy(z, labels, z_test, test_labels)
    results["random_init_linear_top1"], _ = linear_probe(lambda: z, labels, z_test, test_labels)
    z, z_test = extract(method, images), extract(method, test_images)
    for k in (10, 20, 100, 200):
        results[f"knn_top1_k{k}"] = knn_accuracy(z, labels, z_test, test_labels, k)
    results["knn_top1"] = results["knn_top1_k200"]
    draw_neighbours(Path(config.out) / "neighbours.png", data, z, z_test)
    results["linear_top1_1pc"], _ = probe(method, data, config, z, z_test, percent=1)
    results["linear_top1_10pc"], _ = probe(method, data, config, z, z_test, percent=10)
    results["linear_top1"], results["linear_top1_std"] = probe(
        method, data, config, z, z_test, percent=100)
    if len(z) > 100_000:
        results["svm_protocol"] = f"no SVM: {len(z)} images are too many"
    else:
        results["svm_top1"], cost = svm_accuracy(z, labels, z_test, test_labels)
        results["svm_protocol"] = f"one class against the others, cost {cost:g}"
    return results

def draw_neighbours(path, data, z, z_test):
    """Eight test images, each with its eight nearest training images, green if of its class."""
    _, (images, labels), (test_images, test_labels) = data
    tiles = []
    for query in random_rows(len(z_test), 8).tolist():
        nearest = (z @ z_test[query] / z.norm(dim=1)).topk(min(8, len(z))).indices
        tiles.append(frame(test_images[query], "gray"))
        for row in nearest.tolist():
            same = labels[row] == test_labels[query]
            tiles.append(frame(images[row], "lime" if same else "red"))
    save_image(tiles, path, nrow=1 + len(nearest))

# %% MAIN ------------------------------------------------------------------------------------------
def parse_args(argv=None):
    """The Config of a command line.

    Defaults < values of the baseline < preset of the dataset < --quick < flags given.
    """
    parser = ArgumentParser(
        prog=f"{SCRIPT}.py", usage="%(prog)s [flags]", description=__doc__.split("\n")[0],
        epilog="--dataset, --loss and --quick change some of these defaults: see PRESETS and "
               "BASELINES in the script.",
        argument_default=SUPPRESS, allow_abbrev=False)  # SUPPRESS: flags not given are left out
    for setting in fields(Config):
        parser.add_argument("--" + setting.name.replace("_", "-"), **setting.metadata)
    given = vars(parser.parse_args(argv))
    settings = given
    if "quick" in given:
        settings = QUICK | given
    baseline = BASELINES.get(settings.get("loss"), {})
    preset = PRESETS.get(settings.get("dataset"), {})
    config = Config(**(baseline | preset | settings))
    if "warmup_epochs" not in given:
        config.warmup_epochs = min(config.warmup_epochs, config.epochs // 4)
    check(config)
    if not config.out:
        words = [SCRIPT]
        words += [f"{name}={given[name]}" for name in asdict(config)
                  if name in given and name not in FREE]
        if config.dataset in PHOTOS:
            words.append(Path(config.data_root).resolve().name)
        config.out = "runs/" + "-".join(words)
    config.out = os.path.expanduser(config.out)
    config.data_root = os.path.expanduser(config.data_root)
    return config

def check(config):
    """Ends the program if a setting is impossible. `not value > 0` is true of nan, too."""
    positive = ("lam", "auh_scale", "temperature", "epochs", "batch_size", "lr")
    for name, value in asdict(config).items():
        if name in positive and not value > 0:
            stop(f"--{name.replace('_', '-')} must be more than 0")
        if not isinstance(value, str) and not value >= 0:
            stop(f"--{name.replace('_', '-')} must be 0 or more")
    if config.size < 8:
        stop("--size must be 8 or more")
    widths, weights = config.projector.split("-"), config.weights.split(",")
    if not all(width.isdecimal() and int(width) > 1 for width in widths):
        stop(f"widths look like 2048-2048, not like {config.projector}")
    if not all(weight.replace(".", "", 1).isdecimal() for weight in weights):
        stop(f"weights look like 1,40,40, not like {config.weights}")
    if config.batch_size % WORLD > 0 or config.batch_size < 2 * WORLD:
        stop(f"--batch-size must be a multiple of {WORLD} and at least {2 * WORLD}")

def main(argv=None):
    """Runs a command line: trains, evaluates and writes the results."""
    config = parse_args(argv)
    try:
        device = start(config)
        if RANK > 0:
            dist.barrier()  # the first process loads first, as it may have to download
        data = load_data(config, device)
        if WORLD > 1 and RANK == 0:
            dist.barrier()  # lets the others load
        Path(config.out).mkdir(parents=True, exist_ok=True)
        method, log = train(config, data, device)
        if WORLD > 1:
            dist.barrier()
            dist.destroy_process_group()  # the others need not wait for the evaluation
        if RANK == 0:
            finish(method, data, config, log)
    except KeyboardInterrupt:
        stop("stopped; the same command continues from the last checkpoint, if there is one")
    except OSError as problem:  # a full disk, or a folder that cannot be written
        stop(f"{problem}. Once this is fixed, the same command continues")
    except RuntimeError as problem:
        if "out of memory" not in str(problem) and "allocate memory" not in str(problem):
            raise
        stop("memory is full. In training: use a smaller --batch-size, and another --out. In an "
             "evaluation: free memory, and the same command continues")

def finish(method, data, config, log):
    """Evaluates, unless that is done; writes encoder.pt and results.json and prints a summary."""
    out = Path(config.out)
    if not (out / "results.json").exists():
        results = log[0] | log[-1] | {"epochs": config.epochs, "seed": config.seed}
        seen = config.epochs * (len(data[0][1]) // config.batch_size) * config.batch_size
        results["images_per_second"] = seen / results["train_seconds"]
        results["peak_memory_gb"] = torch.cuda.max_memory_allocated() / 2**30  # of the GPU
        if data[1]:
            results.update(evaluate(method, data, config))
        for name, value in results.items():
            if isinstance(value, float):
                results[name] = float(f"{value:.4g}")
        write(out / "encoder.pt", method.encoder.cpu().state_dict())
        write(out / "results.json", json.dumps(results, indent=1))
    results = json.loads((out / "results.json").read_text())
    print(f"{out} is finished; it holds encoder.pt and results.json")
    for name, value in results.items():
        if "top1" in name:
            print(f"  {name:24} {value} %")

if __name__ == "__main__":
    # in a notebook the arguments are those of its kernel: -f FILE
    in_notebook = "kernel_launcher" in sys.argv[0] or sys.argv[1:2] == ["-f"]
    main(["--quick"] if in_notebook else None)
