"""Makes the notebooks of docs/notebooks/ from their sources, with what they print and draw: the .ipynb are never edited.

    pip install -e ".[notebooks]"
    python docs/build_notebooks.py                                                     # with the Hub, and COCO's server
    python docs/build_notebooks.py --parents parents --assets DIR [NAME …]            # without: see `benchmarks.real_parents`

A source is a script in the percent format, which jupytext, Jupyter, VS Code and others open as a notebook. All run in one
folder, in the order of `NAMES`, for some go on with what an earlier one left there.
"""

import argparse
import base64
import io
import os
import shutil
import stat
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any


ROOT = Path(__file__).resolve().parents[1]
FOLDER = ROOT / "docs" / "notebooks"
NAMES = ("quickstart", "look_inside", "own_data", "lit_search")
KERNEL = {"display_name": "Python 3", "language": "python", "name": "python3"}
LARGEST = 95_000  # bytes of an image
QUIET = {
    "HF_HUB_DISABLE_PROGRESS_BARS": "1", "HF_HUB_DISABLE_TELEMETRY": "1", "HF_DATASETS_DISABLE_PROGRESS_BARS": "1",
    "TOKENIZERS_PARALLELISM": "false", "TRANSFORMERS_VERBOSITY": "error", "PYDEVD_DISABLE_FILE_VALIDATION": "1",
}  # fmt: skip


def read(source: Path) -> Any:
    """A source as a notebook that has not run yet."""
    import jupytext

    notebook = jupytext.read(source)
    notebook.metadata = {"kernelspec": KERNEL, "language_info": {"name": "python"}}
    for number, cell in enumerate(notebook.cells):
        cell["id"] = f"{source.stem}-{number}"  # not at random, so that a notebook made again is the same
        cell["metadata"] = {}
    return notebook


def execute(source: Path, folder: Path, environment: Mapping[str, str], timeout: int = 3600) -> Any:
    """
    Runs a source in a folder and in an environment (all variables), and gives the notebook with its outputs.

    Raises:
        nbclient.exceptions.CellExecutionError: where a cell does; shows it.
    """
    from nbclient import NotebookClient

    notebook, programs = read(source), folder / ".programs"
    programs.mkdir(exist_ok=True)
    command = programs / "frozen-prefix"  # of this checkout and this Python, whether or not it is installed
    command.write_text(f'#!/bin/sh\nexec "{sys.executable}" -m modeling_frozen.cli "$@"\n')
    command.chmod(command.stat().st_mode | stat.S_IXUSR)
    variables = {**environment, **QUIET}
    variables["PATH"] = os.pathsep.join([str(programs), variables.get("PATH", "")])
    variables["PYTHONPATH"] = os.pathsep.join([str(ROOT), *filter(None, [variables.get("PYTHONPATH")])])
    client = NotebookClient(notebook, timeout=timeout, resources={"metadata": {"path": str(folder)}})
    client.execute(env=variables)
    tidy(notebook)
    return notebook


def tidy(notebook: Any) -> None:
    """Leaves of the outputs what a reader wants: no progress bars, no warnings; large images as JPEG."""
    for cell in notebook.cells:
        cell["metadata"] = {}
        if cell["cell_type"] == "code":
            kept = [one for one in cell["outputs"] if one["output_type"] != "stream" or one["name"] == "stdout"]
            cell["outputs"] = []
            for output in kept:
                data = output.get("data", {})
                if "image/png" in data:
                    data.pop("text/plain", None)  # the figure's address in memory
                    smaller(data)
                before = cell["outputs"][-1] if cell["outputs"] else {"output_type": ""}
                if output["output_type"] == before["output_type"] == "stream":
                    before["text"] += output["text"]  # parted by chance, as it came
                else:
                    cell["outputs"].append(output)


def smaller(data: dict[str, Any]) -> None:
    """An image as JPEG where it is of LARGEST bytes and more as it is."""
    from PIL import Image

    png = base64.b64decode(data["image/png"])
    if len(png) < LARGEST:
        return
    for quality in (85, 75, 65, 55):
        written = io.BytesIO()
        Image.open(io.BytesIO(png)).convert("RGB").save(written, "JPEG", quality=quality, optimize=True)
        if written.tell() < LARGEST:
            break
    del data["image/png"]
    data["image/jpeg"] = base64.b64encode(written.getvalue()).decode()


@contextmanager
def photos(find: Callable[[str], bytes | None]) -> Iterator[dict[str, str]]:
    """Answers for COCO's server, whose addresses the notebooks name, with photos of this machine, by their file names; gives
    the environment in which they are asked for."""

    class Proxy(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            photo = find(self.path.rpartition("/")[2])
            self.send_response(404 if photo is None else 200)
            self.send_header("Content-Length", str(len(photo or b"")))
            self.end_headers()
            self.wfile.write(photo or b"")

        def log_message(self, *args: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Proxy)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield {"http_proxy": f"http://127.0.0.1:{server.server_port}", "NO_PROXY": "127.0.0.1"}
    finally:
        server.shutdown()
        server.server_close()


def open_photos(assets: Path) -> Callable[[str], bytes | None]:
    """Of a folder of open photos of COCO, in the columns image and coco_url."""
    import pyarrow.parquet

    found = {}
    for path in (assets / "captions" / "coco_open" / "data").glob("*.parquet"):
        for row in pyarrow.parquet.read_table(path, columns=["image", "coco_url"]).to_pylist():
            found[row["coco_url"].rpartition("/")[2]] = row["image"]["bytes"]
    return found.get


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(NAMES)}; default: all")
    parser.add_argument("--parents", type=Path, help="folder of real parents, served on the loopback")
    parser.add_argument("--assets", type=Path, help="folder of photos, served on the loopback")
    parser.add_argument("--folder", type=Path, help="where they run, and leave what they write; default: a new one")
    args = parser.parse_args()
    if unknown := set(args.names) - set(NAMES):
        parser.error(f"no notebooks: {sorted(unknown)}; there are {', '.join(NAMES)}")
    import nbformat

    folder = args.folder or Path(tempfile.mkdtemp())
    folder.mkdir(parents=True, exist_ok=True)
    with ExitStack() as stack:
        environment = dict(os.environ)
        if args.parents is not None:
            sys.path.insert(0, str(ROOT))
            from benchmarks.real_parents import served

            environment |= stack.enter_context(served(args.parents, args.assets))
        if args.assets is not None:
            environment |= stack.enter_context(photos(open_photos(args.assets)))
        for name in args.names or NAMES:
            notebook = execute(FOLDER / f"{name}.py", folder, environment)
            nbformat.write(notebook, FOLDER / f"{name}.ipynb")
            print(f"{name}: {(FOLDER / f'{name}.ipynb').stat().st_size / 1000:.0f} kB", flush=True)
    if args.folder is None:
        shutil.rmtree(folder)


if __name__ == "__main__":
    main()
