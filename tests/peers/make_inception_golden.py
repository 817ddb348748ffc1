"""Makes tests/golden/inception.npz: what pytorch-fid's network says of two images.

    python tests/peers/make_inception_golden.py

Made with torch 2.13.0+cpu, torchvision 0.28.0 and pytorch_fid 0.3.0, in float32. The
weights are not the published ones but numbers drawn from the name of each tensor, by a
generator whose bits never change, so that tests draw the same ones without PyTorch.

The file holds the names and shapes of all tensors as PyTorch has them, and of each
image pool3 as pytorch-fid preprocesses it, and pool3 and logits (without the bias) as
TensorFlow does.
"""

import hashlib
import sys
import types
from pathlib import Path

import numpy as np

GOLDEN = Path(__file__).resolve().parents[1] / "golden" / "inception.npz"


def uniform(name, shape):
    """Numbers in [-1, 1), the same for ever for a name: float32."""
    digest = hashlib.sha256(name.encode()).digest()
    bits = np.random.Philox(key=int.from_bytes(digest[:16], "little"))
    raw = bits.random_raw(int(np.prod(shape))) >> np.uint64(40)
    return (raw.astype(np.float32) * np.float32(2**-23) - 1).reshape(shape)


def tensor(name, shape):
    """A tensor of the random network, by PyTorch's name and layout."""
    u = uniform(name, shape)
    kind = name.rsplit(".", 1)[1]
    if len(shape) > 1:  # keeps the size of activations through the layers
        return u * np.float32(np.sqrt(6 / np.prod(shape[1:])))
    if kind == "running_var":
        return 1 + u * np.float32(0.8)
    return (kind == "weight") + u * np.float32(0.5)


def images(shape=(2, 32, 32, 3)):
    """Noise, darker from image to image: uint8, [B, H, W, C]."""
    x = (uniform("images", shape) + 1) * 127.99
    return (x / np.arange(1, shape[0] + 1).reshape(-1, 1, 1, 1)).astype(np.uint8)


def resize(x, side, *, half_pixel):
    """Bilinear, pixel by pixel in float64: [B, H, W, C] to [B, side, side, C]."""
    x = np.asarray(x, np.float64)
    out = np.zeros((x.shape[0], side, side, x.shape[3]))

    def place(i, size):
        at = (i + 0.5) * size / side - 0.5 if half_pixel else i * size / side
        at = max(at, 0.0)
        low = int(at)
        return low, min(low + 1, size - 1), at - low

    for i in range(side):
        top, bottom, v = place(i, x.shape[1])
        for j in range(side):
            left, right, u = place(j, x.shape[2])
            upper = (1 - u) * x[:, top, left] + u * x[:, top, right]
            lower = (1 - u) * x[:, bottom, left] + u * x[:, bottom, right]
            out[:, i, j] = (1 - v) * upper + v * lower
    return out


def import_pytorch_fid():
    """pytorch_fid.inception; without torchvision's operators, which it does not use."""
    name = "torchvision._meta_registrations"
    sys.modules.setdefault(name, types.ModuleType(name))
    from pytorch_fid import inception

    return inception


def network():
    """(pytorch-fid's network with random weights, as it is before it takes blocks)."""
    import torch

    pi = import_pytorch_fid()
    net = pi._inception_v3(num_classes=1008, aux_logits=False, weights=None)
    net.Mixed_5b = pi.FIDInceptionA(192, pool_features=32)
    net.Mixed_5c = pi.FIDInceptionA(256, pool_features=64)
    net.Mixed_5d = pi.FIDInceptionA(288, pool_features=64)
    for letter, channels in zip("bcde", (128, 160, 160, 192), strict=True):
        setattr(net, f"Mixed_6{letter}", pi.FIDInceptionC(768, channels_7x7=channels))
    net.Mixed_7b = pi.FIDInceptionE_1(1280)
    net.Mixed_7c = pi.FIDInceptionE_2(2048)
    weights = {
        name: torch.from_numpy(tensor(name, tuple(value.shape)))
        for name, value in net.state_dict().items()
        if not name.endswith("num_batches_tracked")
    }
    net.load_state_dict(weights, strict=False)
    return net.eval()


def pool3(net, x, *, preprocess):
    """pool3 of images, [B, H, W, 3] in [0, 1], by pytorch-fid's own forward."""
    import torch

    pi = import_pytorch_fid()
    pi.fid_inception_v3 = lambda: net
    ways = {"resize_input": preprocess, "normalize_input": preprocess}
    model = pi.InceptionV3([3], **ways, use_fid_inception=True).eval()
    x = np.ascontiguousarray(np.asarray(x, np.float32).transpose(0, 3, 1, 2))
    with torch.no_grad():
        return model(torch.from_numpy(x))[0][:, :, 0, 0].numpy()


def main():
    net, x = network(), images()
    scaled = (resize(x, 299, half_pixel=False) - 128) / 128
    tensorflow = pool3(net, scaled, preprocess=False)
    made = {
        "pytorch_fid": pool3(net, x.astype(np.float32) / 255, preprocess=True),
        "tensorflow": tensorflow,
        "logits": tensorflow @ net.fc.weight.detach().numpy().T,
    }
    tensors = [
        f"{name} {','.join(map(str, value.shape))}"
        for name, value in net.state_dict().items()
        if not name.endswith("num_batches_tracked")
    ]
    np.savez_compressed(GOLDEN, tensors=np.array(tensors), **made)
    for name, value in made.items():
        print(name, value.shape, f"mean {value.mean():.3g} deviation {value.std():.3g}")


if __name__ == "__main__":
    main()
