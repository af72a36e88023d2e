"""`chat`: try a folder out, dense, cut and int4 side by side."""

import argparse
import sys
from typing import Any

from . import arguments
from .log_level import hides_progress
from .running import Answer

HELP = "let dense, cut and int4 model answer side by side, on a local page or in the terminal"
USAGE = "FOLDER [--dense DENSE] [--file ONNX] [--no-browser] [options]"
EXAMPLE = "optimum-clp chat qwen3-0.6b-clp20"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of `chat`."""
    what = "folder or Hub id that optimum-clp wrote"
    parser.add_argument("folder", nargs="?", metavar="FOLDER", help=what)
    parser.add_argument("-m", "--model", metavar="FOLDER", help="the same")
    parser.add_argument("--dense", metavar="DENSE", help="dense model (default: the one that the report names)")
    parser.add_argument(
        "--file", metavar="ONNX", help="ONNX file of the folder that answers (default: int4, else int8)"
    )
    parser.add_argument("--no-browser", action="store_true", help="converse in the terminal instead of on a page")
    parser.add_argument(
        "--max-new-tokens", type=int, default=256, metavar="N", help="tokens of an answer (default: 256)"
    )
    parser.add_argument(
        "--temperature",
        type=float,
        default=0.0,
        metavar="T",
        help="of sampling; 0 takes the most likely token (default: 0)",
    )
    parser.add_argument("--tokenizer", help="folder or Hub id of the tokenizer, if it does not lie in FOLDER")
    parser.add_argument("--token", metavar="TOKEN", help="access token for gated and private models, never printed")
    parser.add_argument("--dtype", default="auto", help="of the PyTorch models; auto is what the checkpoint says")
    parser.add_argument("--device", help="of the PyTorch models: cpu, cuda, ...")
    arguments.add_attention_and_cache(parser)
    arguments.add_printing(parser)
    parser.set_defaults(usage_error=parser.error)


def run(args: argparse.Namespace) -> Answer:
    """Run `chat` until the user ends it; the answer is what was said in the terminal."""
    named = [name for name in (args.folder, args.model) if name is not None]
    if len(named) != 1:
        args.usage_error("give one FOLDER, alone or behind --model")
    from ..chat.server import checked_settings
    from ..chat.speakers import open_speakers
    from ..chat.terminal import converse

    settings = checked_settings(args.max_new_tokens, args.temperature)
    speakers = open_speakers(
        named[0],
        dense=args.dense,
        file_name=args.file,
        tokenizer=args.tokenizer,
        token=args.token,
        dtype=args.dtype,
        device=args.device,
        attn_implementation=args.attn_implementation,
        cache_dir=args.model_cache_dir,
        quiet=hides_progress(args),
    )
    if not args.no_browser:
        return _serve(speakers, settings)
    # standard output is kept for the result, which is for whoever is no terminal
    said = converse(speakers, settings, _read_line, sys.stdout)
    is_seen = sys.__stdout__ is not None and sys.__stdout__.isatty() and not args.quiet
    return {"turns": said}, "" if is_seen else _transcript(said)


def _read_line() -> str:
    sys.stdout.write("\n> ")
    sys.stdout.flush()
    line = sys.stdin.readline()
    if not line:
        raise EOFError
    return line


def _transcript(said: list[dict[str, Any]]) -> str:
    parts = []
    for turn in said:
        answers = (f"{name}: {found.get('text', found.get('error'))}" for name, found in turn["answers"].items())
        parts.append("\n".join([f"> {turn['prompt']}", *answers]))
    return "\n\n".join(parts)


def _serve(speakers: Any, settings: Any) -> Answer:
    import webbrowser

    from ..chat.server import ChatServer

    with ChatServer(speakers, settings) as server:
        for line in speakers.left_out:
            print(line)
        print(f"The page is at {server.address} (for this machine alone). Ctrl-C ends it.", flush=True)
        webbrowser.open(server.address)
        try:
            server.serve_forever()
        except KeyboardInterrupt:
            server.stop()
    return {}, "The page is closed."
