"""Who may import whom, read from the source without running it."""

import ast
import graphlib
from pathlib import Path

ROOT = Path(__file__).parents[1]

# The rooms (a file or a folder of jaxtune/), lowest first.  A room imports from its own line and from those before it.
TIERS = (
    "errors typing tree",
    "rundir cadence storage scoring questions origin kept identity answers tensorboard metrics wandb_log console "
    "signals data spm tokenizer scores",
    "hosts mesh layers attention quant remat compiler profile",
    "models peft",
    "hf checkpoint deterministic adamw8bit optim loss state step steplog peek",
    "defaults config",  # Read by commands alone, which unpack it into arguments.
    # Commands, and what only they share.
    "adapt results cli lm train plan preview generate likelihood trained board measure evaluate lm_eval export probe "
    "compare doctor",
)
HOMELESS = len(TIERS)
# Their place would allow it, and yet: they meet through paths, boxes and the doors of layers.py.
NEVER = {("models", "peft"), ("models", "quant"), ("peft", "models")}

# Files that torch_gpu/ reads too: no array library, and none by way of another file.
PLAIN = (
    "errors typing defaults config cli rundir cadence storage scoring questions origin kept identity answers "
    "tensorboard metrics wandb_log console signals data spm tokenizer scores"
)
PLAIN_FILES = {"jaxtune.models", "jaxtune.hf.files", "jaxtune.hf.card", "jaxtune.hf.handover", "jaxtune.hf.hub"}
ARRAYS = {"jax", "jaxlib", "flax", "optax", "orbax"}
REFERENCES = {"torch", "transformers", "peft", "bitsandbytes"}  # For tests and torch_gpu/.

MAX_LINES = 400
TABLES: set[str] = set()  # Longer files that are tables through and through, as jaxtune/x.py.


def modules(folder):
    """{'jaxtune.hf.rows': its file} of a folder."""
    files = {path.relative_to(ROOT).with_suffix(""): path for path in sorted((ROOT / folder).rglob("*.py"))}
    return {".".join(path.parts).removesuffix(".__init__"): file for path, file in files.items()}


JAXTUNE = modules("jaxtune")


def imports(path, body_only=False):
    """The modules that a file imports: `from jaxtune.hf import rows` is `jaxtune.hf.rows`.

    body_only: without those inside functions, which run later or never.  `if TYPE_CHECKING` never runs.
    """
    module, names = ast.parse(path.read_text(), str(path)), set()
    module.body = [n for n in module.body if not (isinstance(n, ast.If) and ast.unparse(n.test) == "TYPE_CHECKING")]
    for node in module.body if body_only else ast.walk(module):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}, line {node.lineno}: name the module in full, from jaxtune"
            inner = {f"{node.module}.{alias.name}" for alias in node.names}
            names |= {name if name in JAXTUNE else node.module for name in inner}
    return names


def ours(names):
    return sorted(names & JAXTUNE.keys() - {"jaxtune"})


def room(name):
    """`hf`, of jaxtune.hf.rows."""
    return name.split(".")[1] if "." in name else ""


def tier(name):
    """Lowest for jaxtune/__init__.py, which imports its public names when they are first used."""
    return next(
        (i for i, rooms in enumerate(TIERS) if room(name) in rooms.split()), -1 if room(name) == "" else HOMELESS
    )


def is_plain(name):
    """Of the models: the tables of Hugging Face names, and the door to them."""
    return room(name) in ["", *PLAIN.split()] or name in PLAIN_FILES or name.endswith("_hf")


def refuse(complaints):
    complaints = list(complaints)
    assert not complaints, "\n" + "\n".join(complaints)


def refuse_arrays(files, **how):
    found = {name: imports(path, **how) for name, path in files.items()}
    refuse(f"{name} imports {other}" for name in found for other in found[name] if other.split(".")[0] in ARRAYS)
    refuse(f"{name} imports {other}, not plain" for name in found for other in ours(found[name]) if not is_plain(other))


def test_every_file_has_a_room():
    refuse(f"{name}: give it a place in TIERS, tests/test_layering.py" for name in JAXTUNE if tier(name) == HOMELESS)


def test_imports_point_down():
    refuse(
        f"{name} imports {other}: {room(name)} is not to know {room(other)}"
        for name, path in JAXTUNE.items()
        for other in ours(imports(path))
        if tier(other) > tier(name) or (room(name), room(other)) in NEVER
    )


def test_no_import_comes_back_to_its_file():
    graphlib.TopologicalSorter({name: ours(imports(p, body_only=True)) for name, p in JAXTUNE.items()}).prepare()


def test_plain_files_load_no_array_library():
    door = {"jaxtune.models": JAXTUNE["jaxtune.models"]}  # It imports a Flax module only when asked to build one.
    refuse_arrays(door, body_only=True)
    refuse_arrays({name: path for name, path in JAXTUNE.items() if is_plain(name) and name not in door})


def test_torch_gpu_needs_no_jax():
    refuse_arrays(modules("torch_gpu"))


def test_jaxtune_imports_no_reference():
    refuse(
        f"{name} imports {other}"
        for name, path in JAXTUNE.items()
        for other in imports(path)
        if other.split(".")[0] in REFERENCES
    )


def test_configs_are_data():
    refuse(
        f"{name} imports {other}: a recipe imports ml_collections and jaxtune.config alone"
        for name, path in modules("configs").items()
        for other in imports(path)
        if other != "jaxtune.config" and other.split(".")[0] != "ml_collections"
    )


def test_a_file_is_read_in_one_sitting():
    files = [*JAXTUNE.values(), *modules("torch_gpu").values()]
    length = {path.relative_to(ROOT).as_posix(): len(path.read_text().splitlines()) for path in files}
    refuse(f"{p}: {n} lines, more than {MAX_LINES}" for p, n in length.items() if n > MAX_LINES and p not in TABLES)
    refuse(f"{p}: find its subject and name it so" for p in length if p.endswith(("/utils.py", "/helpers.py")))
