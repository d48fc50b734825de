"""What every method and every task must keep to, as functions that anyone can call in their own tests:

    @pytest.mark.parametrize("contract", METHOD_CONTRACTS)
    def test_my_method(contract, tmp_path):
        contract(Subject("my_method", tmp_path))

Each function is one promise; it raises AssertionError where the promise is broken. Methods are tried on the task
"synthetic" unless the Subject names another.
"""

from harness.contracts.methods import METHOD_CONTRACTS
from harness.contracts.subject import Subject, spec_of, start
from harness.contracts.tasks import TASK_CONTRACTS

__all__ = ["METHOD_CONTRACTS", "TASK_CONTRACTS", "Subject", "spec_of", "start"]
