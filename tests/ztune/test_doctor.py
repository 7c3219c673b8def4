"""The check of matrix products, and what the command says of wrong ones."""

import numpy as np
import pytest

from tests.conftest import Command
from ztune import doctor
from ztune.doctor import check_products, wrong_products
from ztune.errors import ProviderError
from ztune.types import F32


def test_products_are_right_here(ztune: Command) -> None:
    found = check_products()
    assert set(found) == {"numpy", "onnxruntime"}
    assert all(error is not None and error < 1e-4 for error in found.values())
    assert wrong_products(found) == []
    assert set(ztune("doctor", "--json", "--quiet").json["products"]) == set(found)


def broken(a: F32, b: F32) -> F32:
    """A product whose last column is wrong, as of a kernel that leaves out a remainder."""
    product: F32 = np.einsum("ik,kj->ij", a, b)
    if product.shape[1] % 4:
        product[:, -1] = 0
    return product


def not_finite(a: F32, b: F32) -> F32:
    return np.full((len(a), b.shape[1]), np.nan, np.float32)


@pytest.mark.parametrize("wrong", [broken, not_finite])
def test_a_package_with_wrong_products_is_named(
    wrong: object, ztune: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(doctor, "product_in_graph", lambda: wrong)
    assert [line.split(" are ")[0] for line in wrong_products(check_products())] == [
        "matrix products of onnxruntime"
    ]
    done = ztune("doctor")
    assert done.code == 1
    assert done.err.startswith("error: matrix products of onnxruntime are wrong by ")
    monkeypatch.undo()
    monkeypatch.setattr(np, "matmul", wrong)
    assert "of numpy" in ztune("doctor").err


def test_a_client_without_onnx_runtime_checks_numpy(monkeypatch: pytest.MonkeyPatch) -> None:
    def none() -> None:
        raise ProviderError("not installed")

    monkeypatch.setattr(doctor, "product_in_graph", none)
    found = check_products()
    assert found["onnxruntime"] is None
    assert wrong_products(found) == []
