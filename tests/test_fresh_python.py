"""Fresh Pythons are what a fresh process would be, in what tests vary; and one thread works in each process of a run."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.helpers import fresh_python


def output_of(*arguments: str, **options: object) -> str:
    done = fresh_python.run(*arguments, **options)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_they_have_their_own_environment_folder_and_arguments(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OURS", "seen")
    code = "import os, sys; print(os.environ.get('OURS'), os.getcwd(), sys.argv, sys.path[:2], __name__)"
    env = {**os.environ, "PYTHONPATH": "/there"}
    assert (
        output_of("-c", code, "a", "b", cwd=tmp_path, env=env) == f"seen {tmp_path} ['-c', 'a', 'b'] ['', '/there'] __main__\n"
    )
    del env["OURS"]
    assert output_of("-c", code, cwd=tmp_path, env=env).startswith("None ")
    (tmp_path / "script.py").write_text(f"{code}; print(__file__, sys.stdin.read())")
    script = str(tmp_path / "script.py")
    line = f"seen {Path.cwd()} ['{script}', 'a'] ['{tmp_path}', "
    assert output_of(script, "a").startswith(line) and output_of(script).endswith(f"__main__\n{script} \n")
    assert output_of("-m", "script", "a", cwd=tmp_path).splitlines()[0].endswith("__main__")


def test_they_end_as_a_process_does() -> None:
    ends = {
        "raise SystemExit": 0,
        "raise SystemExit(3)": 3,
        "raise SystemExit('in words')": 1,
        "1 / 0": 1,
        "import os; os._exit(4)": 4,
        "import os, signal; os.kill(os.getpid(), signal.SIGKILL)": -signal.SIGKILL,
    }
    done = {code: fresh_python.run("-c", code) for code in ends}
    assert {code: one.returncode for code, one in done.items()} == ends
    assert done["raise SystemExit('in words')"].stderr == "in words\n"
    assert "ZeroDivisionError" in done["1 / 0"].stderr
    late = "import atexit, threading, time; atexit.register(print, 'at exit')"
    late += "; threading.Thread(target=lambda: (time.sleep(0.1), print('thread'))).start(); print('main')"
    assert output_of("-c", late) == "main\nthread\nat exit\n"
    with pytest.raises(subprocess.TimeoutExpired):
        fresh_python.run("-c", "import time; time.sleep(60)", timeout=0.2)


def test_they_import_for_themselves_what_reads_the_environment(tmp_path: Path) -> None:
    loaded = "import sys; print(sorted({name.partition('.')[0] for name in sys.modules} & set(%r)))"
    assert output_of("-c", loaded % (fresh_python.NEVER_PRELOADED,)) == "[]\n"
    code = "from huggingface_hub import constants; print(constants.HF_HOME)"
    for name in ("one", "other"):
        assert output_of("-c", code, env={**os.environ, "HF_HOME": str(tmp_path / name)}) == f"{tmp_path / name}\n"


def test_no_two_draw_the_same_numbers_unless_they_seed() -> None:
    drawn = "import random, numpy, torch; print(random.random(), numpy.random.rand(), torch.initial_seed())"
    assert len({number for _ in range(2) for number in output_of("-c", drawn).split()}) == 6


@pytest.mark.skipif(not fresh_python.FORKS, reason="nothing is forked here")
def test_the_server_has_one_thread_as_forks_take_no_other() -> None:
    output_of("-c", "")
    threads = [path.read_text().strip() for path in Path(f"/proc/{fresh_python._server.pid}/task").glob("*/comm")]
    # jemalloc, which pyarrow brings, starts its own anew in each fork.
    assert len([name for name in threads if name != "jemalloc_bg_thd"]) == 1, threads


def test_one_thread_whatever_the_caller_asks_for() -> None:
    threads = "import torch; print(torch.get_num_threads())"
    assert torch.get_num_threads() == 1 and output_of("-c", threads) == "1\n"
    asked = {**fresh_python.environment(), **{name: "2" for name in os.environ if name.endswith("_NUM_THREADS")}}
    code = "import tests.conftest, os; print({os.environ[f'{name}_NUM_THREADS'] for name in ('OMP', 'MKL', 'OPENBLAS')})"
    done = subprocess.run([sys.executable, "-c", code], env=asked, capture_output=True, text=True, check=True)
    assert done.stdout == "{'1'}\n"
