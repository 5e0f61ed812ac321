"""Is every position chosen equally often?"""

import numpy as np
from scipy import stats


def p_value_uniform(chosen: np.ndarray, n_chosen: int) -> float:
    """Chi-square of how often each position is chosen, `n_chosen` at a time.

    Args:
      chosen: bool [draws positions].
      n_chosen: True entries of each draw.
    """
    draws, size = chosen.shape
    p = n_chosen / size
    excess = chosen.sum(axis=0) - draws * p
    # Draws without replacement: their covariance has size - 1 equal eigenvalues.
    statistic = (excess**2).sum() / (draws * p * (1 - p)) * (size - 1) / size
    return stats.chi2.sf(statistic, size - 1)
