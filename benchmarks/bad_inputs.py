"""Bad inputs, and the line that each gives: from the command line and from Python.

    python -m benchmarks.bad_inputs

Every command runs as a process of its own and must end with one line that begins with "error: ", and the code 2; every
call from Python must raise InputError with one line. What does otherwise is marked, and the program ends with code 1.
"""

import concurrent.futures
import contextlib
import functools
import os
import shlex
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from absl import flags

import fdjax
from fdjax import data
from fdjax.errors import InputError
from fdjax.run import program, report

COMMANDS = (
    # flags
    "--rounds=three",
    "--rounds=3.5",
    "--rounds",
    "--rounds=0",
    "--round=3",
    "--learning_rat=0.1",
    "--nocentral_evl",
    "--central_eval=maybe",
    "--flagfile=nowhere.txt",
    "rounds=3",
    "--checkpoint_every=-1",
    # names
    "--algorithm=fedvag",
    "--dataset=mnits",
    "--model=cnn9",
    "--partition=dirichlet_q",
    "--optimizer=sgdm",
    "--schedule=steps",
    "--augment=flip",
    "--proxy=nois",
    "--local_eval=some",
    "--padding=same --model=cnn1",
    "--models=2nn",
    "--models=2nn:x --algorithm=feddistill",
    "--algorithm=dsfl --proxy=noise --aggregation=eras",
    # ranges
    "--learning_rate=-1",
    "--learning_rate=nan",
    "--local_epochs=0",
    "--local_epochs=1.5",
    "--momentum=1.5",
    "--schedule=step --decay=2",
    "--participation=0",
    "--alpha=-1 --partition=dirichlet_a",
    "--seed=-1",
    "--seed=99999999999",
    "--num_clients=0",
    "--validation_fraction=1",
    "--memory_limit=0.0001",
    "--devices=99",
    "--chunk=-1",
    "--algorithm=feddistill --temperature=0",
    "--algorithm=feddistill --weight=2",
    "--dropped=1",
    # given and not used
    "--temperature=2",
    "--momentum=0.9 --optimizer=adam",
    "--decay=0.5",
    "--data_dir=data",
    "--writers=writers.npz",
    "--proxy_size=100",
    "--proxy=noise",
    "--distill_batch_size=8",
    "--padding=SAME",
    "--alpha=1 --partition=iid",
    "--straggler_work=drop",
    "--capacity=5",
    "--server_optimizer=adam",
    "--norm=batch",
    "--exchanged=Dense_0/* --algorithm=fd",
    "--num_processes=2",
    "--local_steps=5 --local_epochs=3",
    # what only the data can tell
    "--num_clients=6001",
    "--partition=dirichlet_a --alpha=0.01 --num_clients=500",
    "--partition=shards --num_clients=4000",
    "--dataset=mnist --data_dir=nowhere",
    "--dataset=idx",
    "--dataset=synthetic --num_clients=1000000000",
    "--dataset=synthetic --model=cnn1",
    "--algorithm=fedmd",
    "--algorithm=fedmd --proxy=noise",
    "--proxy=held_out --proxy_size=6000",
    "--algorithm=fedaux --proxy=held_out --proxy_size=2",
    "--algorithm=feddistill --models=2nn:3,mclr:3",
    "--algorithm=fedgkt",
    "--models=mclr:2,2nn:8",
    "--stragglers=0.5",
    # privacy
    "--privacy=client --noise_multiplier=1",
    "--privacy=client --clip=1 --noise_multiplier=-1",
    "--privacy=client --clip=1 --noise_multiplier=1 --delta=0",
    "--privacy=client --clip=1 --target_epsilon=0",
    "--privacy=client --clip=1 --noise_multiplier=1 --sampling=poisson --participation=0.5 --capacity=5",
    "--privacy=client --clip=1 --algorithm=fd",
    "--privacy=example --clip=1 --algorithm=fd",
    "--privacy=means --clip=1",
    "--clip=1",
    # files
    "--algorithm=nowhere.py",
    "--algorithm=broken.py",
    "--algorithm=empty.py",
    "--model=net.py:Nothing",
    "--out=file",
    "--out=file/below",
    "--resume",
    "--out=new --resume",
    "--resume --overwrite --out=new",
    "--seeds=0,one",
    "--seeds=0,0",
    "--seeds=0,1 --resume --out=new",
)


def _run(**named: Any) -> Any:
    small = {"dataset": "synthetic", "num_clients": 4, "samples_per_client": 20, "model": "mclr", "rounds": 1}
    return fdjax.run(**small | named, progress=False)


def _source(**changes: Any) -> Any:
    source = data.load("synthetic", num_clients=3, samples_per_client=20)
    return data.checked(source._replace(**{name: change(source) for name, change in changes.items()}))


CALLS: dict[str, Callable[[], Any]] = {
    "run(rounds=3.5)": lambda: _run(rounds=3.5),
    'run(rounds="3")': lambda: _run(rounds="3"),
    "run(rounds=True)": lambda: _run(rounds=True),
    'run(learning_rate="0.1")': lambda: _run(learning_rate="0.1"),
    "run(learning_rate=None)": lambda: _run(learning_rate=None),
    "run(learning_rate=[0.1, 0.2])": lambda: _run(learning_rate=[0.1, 0.2]),
    "run(learning_rate=jnp.ones(2))": lambda: _run(learning_rate=jnp.ones(2)),
    "run(learning_rate=10**400)": lambda: _run(learning_rate=10**400),
    "run(learnig_rate=0.1)": lambda: _run(learnig_rate=0.1),
    'run(algorithm="fedvag")': lambda: _run(algorithm="fedvag"),
    "run(algorithm=None)": lambda: _run(algorithm=None),
    "run(algorithm=fdjax.Method)": lambda: _run(algorithm=fdjax.Method),
    'run(aggregation="sa")': lambda: _run(aggregation="sa"),
    'run(algorithm="dsfl", proxy="noise", aggregation=3)': lambda: _run(algorithm="dsfl", proxy="noise", aggregation=3),
    'run(algorithm="dsfl")': lambda: _run(algorithm="dsfl"),
    "run(dataset=array)": lambda: _run(dataset=np.zeros(3)),
    "run(dataset=None)": lambda: _run(dataset=None),
    "run(models=3)": lambda: _run(models=3),
    'run(algorithm="feddistill", models=[("mclr", 4.5)])': lambda: _run(algorithm="feddistill", models=[("mclr", 4.5)]),
    "run(seed=2**40)": lambda: _run(seed=2**40),
    "run(hparams=[1, 2])": lambda: _run(hparams=[1, 2]),
    'run({"rounds": 1})': lambda: fdjax.run({"rounds": 1}),  # pyright: ignore[reportArgumentType]
    "run(Settings(rounds=0))": lambda: fdjax.run(fdjax.Settings(rounds=0)),
    "run(Settings(), rounds=3)": lambda: fdjax.run(fdjax.Settings(), rounds=3),
    "run(out=3)": lambda: _run(out=3),
    'run(out=b"folder")': lambda: _run(out=b"folder"),
    "run(resume=True)": lambda: _run(resume=True),
    'run(resume="yes", out="x")': lambda: _run(resume="yes", out="x"),
    "run(checkpoint_every=5)": lambda: _run(checkpoint_every=5),
    'run(checkpoint_every=-1, out="x")': lambda: _run(checkpoint_every=-1, out="x"),
    "run_seeds([])": lambda: fdjax.run_seeds([]),
    "run_seeds([0, 0])": lambda: fdjax.run_seeds([0, 0]),
    "run_seeds([0.5])": lambda: fdjax.run_seeds([0.5]),
    'load("nowhere")': lambda: fdjax.load("nowhere"),
    'check_method("nope")': lambda: fdjax.check_method("nope"),
    'check_method("fedavg", hparams={"x": 1})': lambda: fdjax.check_method("fedavg", hparams={"x": 1}),
    'models.build("cnn1", (28, 28), 10)': lambda: fdjax.models.build("cnn1", (28, 28), 10),
    'models.build("mclr", 28, 10)': lambda: fdjax.models.build("mclr", 28, 10),  # pyright: ignore[reportArgumentType]
    'data.load("mnits")': lambda: data.load("mnits"),
    "a source with labels up to K": lambda: _source(train_y=lambda s: s.train_y + 5),
    "a source with NaN": lambda: _source(train_x=lambda s: np.where(s.train_x > 2, np.nan, s.train_x)),
    "a source with fewer labels than inputs": lambda: _source(test_y=lambda s: s.test_y[:-1]),
    "a source without test examples": lambda: _source(test_x=lambda s: s.test_x[:0], test_y=lambda s: s.test_y[:0]),
    "data.partition of labels [N, 1]": lambda: data.partition("iid", np.zeros((9, 1), int), 3, 0, num_classes=2),
}


def main() -> None:
    """Try them all, print and write the table."""
    out = report.prepare(flags.FLAGS.out, overwrite=True)
    with tempfile.TemporaryDirectory() as folder:
        files = {"file": "", "broken.py": "x = ", "empty.py": "", "net.py": "", "data": None}
        for name, text in files.items():
            (Path(folder) / name).mkdir() if text is None else (Path(folder) / name).write_text(text)
        with concurrent.futures.ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
            lines = [*pool.map(functools.partial(_of_command, folder), range(len(COMMANDS)))]
        with contextlib.chdir(folder):
            lines += [_of_call(call) for call in CALLS.values()]
        lines = [line.replace(f"{folder}/", "") for line in lines]
    names = [f"`{command}`" for command in COMMANDS] + [f"`{name}`" for name in CALLS]
    text = report.table(zip(names, lines, strict=True), ("input", "what it gives"))
    bad = sum(line.startswith("**") for line in lines)
    head = (
        f"{len(COMMANDS)} commands `python -m fdjax ...` and {len(CALLS)} calls from Python; {bad} give no single line."
    )
    print(f"{head}\n\n{text}")
    report.write_text(out / "table.md", f"# benchmarks.bad_inputs\n\n{head}\n\n{text}\n")
    if bad:
        sys.exit(1)


def _of_command(folder: str, number: int) -> str:
    command = COMMANDS[number]
    given = shlex.split(command)
    more = [] if "--out" in command or "--resume" in given else [f"--out={folder}/out{number}"]
    path = os.pathsep.join([os.getcwd(), *filter(None, [os.environ.get("PYTHONPATH")])])
    found = subprocess.run(
        [sys.executable, "-m", "fdjax", *given, *more], capture_output=True, text=True, cwd=folder,
        env=os.environ | {"PYTHONPATH": path},
    )  # fmt: skip
    lines = found.stderr.strip().splitlines()
    if found.returncode == 2 and len(lines) == 1 and lines[0].startswith("error: "):
        return lines[0].removeprefix("error: ")
    return f"**code {found.returncode}, {len(lines)} lines, the last: {lines[-1] if lines else ''}**"


def _of_call(call: Callable[[], Any]) -> str:
    try:
        call()
    except InputError as error:
        text = str(error)
        return text if "\n" not in text else f"**lines: {text.splitlines()}**"
    except Exception as error:
        return f"**{type(error).__name__}: {str(error).splitlines()[:1]}**"
    return "**no error**"


if __name__ == "__main__":
    program.define_output_flags("benchmarks/results/bad_inputs")
    program.start(main)
