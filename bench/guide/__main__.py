"""docs/guide/: `python -m bench.guide` writes its pages; with --pictures it draws first what they show.

python -m bench.guide                            # all pages, from what is measured and drawn; the same bytes each time
python -m bench.guide --pictures                 # draws with every optimization that can run here, first
python -m bench.guide --pictures deepcache tgate # with these
"""

import argparse
import logging
import sys
from pathlib import Path

from bench.common import ROOT
from bench.guide import book, front_pictures, pictures
from sd import optimizations
from sd.writing import write_whole


def main(argv: list[str] | None = None) -> int:
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    description, _, details = __doc__.partition("\n\n")
    parser = argparse.ArgumentParser(
        description=description, epilog=details, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("names", nargs="*", metavar="NAME", help="with --pictures: optimizations (all)")
    parser.add_argument("--pictures", action="store_true", help="draw, before the pages are written")
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"), help="that draws (%(default)s)")
    parser.add_argument("--out", type=Path, default=ROOT / "docs" / "guide", metavar="DIR", help="(docs/guide)")
    args = parser.parse_args(argv)
    known = [*optimizations.catalog(), *book.PRESETS]
    if unknown := set(args.names) - set(known):
        parser.error(f"no optimization {', '.join(sorted(unknown))}; see --list-opts")
    if args.pictures:
        pictures.write(args.out / "pictures", args.names or known, args.device)
        if not args.names:
            front_pictures.write(args.out / "pictures")
    write(args.out)
    return 0


def write(out: Path) -> None:
    """Every file of the guide that is not drawn, below this folder; of an earlier guide's no page is left."""
    pages = book.pages(out / "pictures")
    for name, content in pages.items():
        path = out / name
        path.parent.mkdir(parents=True, exist_ok=True)
        write_whole(path, content.encode())
    for path in (*out.glob("**/*.md"), *out.glob("drawings/*.svg")):
        if path.relative_to(out).as_posix() not in pages:
            path.unlink()


if __name__ == "__main__":
    sys.exit(main())
