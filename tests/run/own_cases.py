"""A user's own files, written for the tests of this folder."""

from pathlib import Path

HERE = Path(__file__).resolve().parents[1] / "own_files"
METHOD, NET = HERE / "server_momentum.py", f"{HERE / 'net.py'}:Net"


def file(folder, text, name="my.py"):
    folder.mkdir(exist_ok=True)
    (folder / name).write_text(text)
    return str(folder / name)


def method_file(folder, scale="1.0", hparams="{}", more="", name="my.py"):
    """FedAvg that sends its params times a number: `scale`, an expression."""
    text = f"""
import jax
from fdjax import HParam, Method
from fdjax.algorithms import fedavg
from fdjax.method import LOCAL_TRAINING
{more}

def build(task):
    base = fedavg.fedavg(task)
    (exchange,) = base.round
    def server(ctx, params, mean):
        return jax.tree.map(lambda w: {scale} * w, mean), {{}}
    return base._replace(round=(exchange._replace(server=server),))

METHOD = Method("mine", "scaled", build, LOCAL_TRAINING | {hparams}, one_architecture=True)
"""
    return file(folder, text, name)
