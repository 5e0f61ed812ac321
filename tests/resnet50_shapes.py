"""ResNet-50 v1.5 (stride in the 3x3 convolution) as kernel shapes and positions.

Names and padding follow the Keras model that the published tables were counted on.
There the first convolution sees an input already padded from 224 to 230, and the
counting rule for "same" padding, ceil((230 - 7 + 1 + 2 * 3) / 2), gives it 115 output
positions per side where the network has 112.
"""

from collections.abc import Iterator

CONV1_SIDE = 115
# channels of the 3x3 convolution, number of blocks, output positions per side
STAGES = ((64, 3, 56), (128, 4, 28), (256, 6, 14), (512, 3, 7))


def layers() -> Iterator[tuple[str, tuple[int, ...], int]]:
    """Yields name, kernel shape and output positions per side of each layer."""
    yield "conv1", (7, 7, 3, 64), CONV1_SIDE
    c_in, side_in = 64, STAGES[0][2]
    for stage, (channels, n_blocks, side) in enumerate(STAGES, start=2):
        c_out = 4 * channels
        for block in "abcdef"[:n_blocks]:
            name = f"res{stage}{block}_branch"
            if block == "a":
                yield f"{name}1", (1, 1, c_in, c_out), side
            yield f"{name}2a", (1, 1, c_in, channels), side_in
            yield f"{name}2b", (3, 3, channels, channels), side
            yield f"{name}2c", (1, 1, channels, c_out), side
            c_in, side_in = c_out, side
    yield "fc", (c_in, 1000), 1


def shapes(width: float = 1.0) -> dict[str, tuple[int, ...]]:
    """Kernel shapes, with all channels but the 3 inputs and 1000 outputs scaled."""
    fixed = {("conv1", 3), ("fc", 1000)}
    return {
        name: (
            *shape[:-2],
            *(c if (name, c) in fixed else int(c * width) for c in shape[-2:]),
        )
        for name, shape, _ in layers()
    }


def positions() -> dict[str, int]:
    """Number of output positions of each layer for one image of 224 x 224."""
    return {name: side**2 for name, _, side in layers()}
