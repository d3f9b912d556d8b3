import numpy as np
from numpy.typing import NDArray

def expand_tile(
    data: NDArray[np.uint8],
    scales: NDArray[np.float32],
    zero_points: NDArray[np.uint8] | None,
    weights: NDArray[np.int8],
    channel_scales: NDArray[np.float32],
    bits: int,
    /,
) -> None: ...
