"""`covered.json` says which test compares which objective with TRL; an objective's `parity` claim must have one."""

import ast
import inspect
import json
import textwrap
from pathlib import Path

from trl.experimental.cpo.cpo_trainer import CPOTrainer
from trl.experimental.tpo.tpo_trainer import TPOTrainer
from trl.trainer.dpo_trainer import DPOTrainer
from trl.trainer.grpo_trainer import GRPOTrainer
from trl.trainer.kto_trainer import KTOTrainer
from trl_stubs import GRPO_TYPES, LOSS_TYPES

from diffalign import losses

HERE = Path(__file__).parent
COVERED = json.loads((HERE / "covered.json").read_text())


def test_every_claim_of_parity_with_trl_has_a_test():
    claims = {name for name, cls in losses.catalogue().items() if cls.parity.startswith("TRL")}
    assert claims == set(COVERED)


def test_the_tests_exist_and_name_the_objective():
    trees = {path.name: ast.parse(path.read_text()) for path in HERE.glob("test_trl_*.py")}
    tables = {name for name, _, _ in LOSS_TYPES.values()} | set(GRPO_TYPES)
    for objective, place in COVERED.items():
        file, function = place.split("::")
        nodes = list(ast.walk(trees[file]))
        assert any(isinstance(node, ast.FunctionDef) and node.name == function for node in nodes), place
        strings = {node.value for node in nodes if isinstance(node, ast.Constant) and isinstance(node.value, str)}
        assert objective in strings | tables, f"{file} never names {objective}"


def branches(method):
    """The strings that a method compares `loss_type` with."""
    found = set()
    for node in ast.walk(ast.parse(textwrap.dedent(inspect.getsource(method)))):
        if isinstance(node, ast.Compare) and "loss_type" in ast.unparse(node.left):
            found |= {c.value for c in ast.walk(node) if isinstance(c, ast.Constant) and isinstance(c.value, str)}
    return found


def test_every_loss_of_trl_is_compared():
    """A new release with another loss is noticed."""
    assert branches(DPOTrainer._compute_loss) == set(LOSS_TYPES)
    assert branches(KTOTrainer._compute_loss) == {"kto", "apo_zero_unpaired"}
    assert branches(GRPOTrainer._compute_loss) == {trl for trl, _, _ in GRPO_TYPES.values()}
    assert branches(CPOTrainer.cpo_loss) == {"simpo", "sigmoid", "hinge", "ipo"}
    assert branches(TPOTrainer._compute_loss) == {"sigmoid", "hinge", "ipo", "tpo-l"}
