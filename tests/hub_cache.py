"""Models in a Hub cache, laid out as huggingface_hub does: offline, they can be had from that cache alone."""

import shutil

COMMIT = "a" * 40


def put_into_cache(source, cache, repository):
    """Copy a folder's files into the cache as those of a repository's main branch; gives back the snapshot's folder."""
    place = cache / f"models--{repository.replace('/', '--')}"
    (place / "refs").mkdir(parents=True)
    (place / "refs" / "main").write_text(COMMIT)
    shutil.copytree(source, place / "snapshots" / COMMIT)
    return place / "snapshots" / COMMIT
