"""Progress bars on standard error, shown only for work that takes longer than two seconds."""

from tqdm.auto import tqdm


def progress_bar(total: int, description: str, quiet: bool = False) -> tqdm:
    """A bar for `total` steps, to be used as a context manager and advanced with `.update(n)`.

    Args:
        total (`int`): Number of steps.
        description (`str`): What is being done.
        quiet (`bool`): Show nothing.
    """
    return tqdm(total=total, desc=description, disable=quiet, delay=2.0, leave=False, dynamic_ncols=True)
