"""The solver against oracles: every mask tried, and an exact surgeon, row by row."""

from __future__ import annotations

import itertools
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from threadpoolctl import threadpool_limits

from repo_manager.pruning.calibrate import workers
from repo_manager.pruning.moments import Moments
from repo_manager.pruning.quadratic import LayerProblem
from repo_manager.pruning.solve import Solution, solve
from repo_manager.sparsity.pattern import two_four_mask, valid_groups


def problem(columns: int, rows: int, samples: int, seed: int, *, mixed: float = 0.9, relu: bool = True) -> LayerProblem:
    """Dependent inputs, as activations are. The dense layer's own answers are the target."""
    random = np.random.default_rng(seed)
    mixing = (1 - mixed) * np.eye(columns) + mixed * random.normal(size=(columns, columns)) / columns**0.5
    inputs = mixing @ random.normal(size=(columns, samples))
    return problem_of(np.maximum(inputs, 0) if relu else inputs, random.normal(size=(rows, columns)))


def problem_of(inputs: np.ndarray, dense: np.ndarray) -> LayerProblem:
    answers = dense @ inputs
    return LayerProblem(dense.astype(np.float32), inputs @ inputs.T, answers @ inputs.T, (answers**2).sum(axis=1))


def solved(given: LayerProblem, threads: int = 2) -> Solution:
    with threadpool_limits(limits=1), ThreadPoolExecutor(threads) as pool:
        found = solve(given, pool)
    valid, groups = valid_groups(found.weights, 1)
    assert valid == groups
    assert np.isfinite(found.weights).all()
    return found


def damped(given: LayerProblem) -> tuple[np.ndarray, np.ndarray, float]:
    added = given.damping(0.01)
    constant = given.energy.sum() + (added * given.dense.astype(float) ** 2).sum()
    return given.moments + np.diag(added), given.target + added * given.dense, float(constant)


def error_of(given: LayerProblem, weights: np.ndarray) -> float:
    matrix, wanted, constant = damped(given)
    rows = weights.astype(float)
    return float(np.einsum("ni,ij,nj->", rows, matrix, rows) - 2 * (rows * wanted).sum() + constant)


def least_error(given: LayerProblem) -> float:
    """Try every mask of every row."""
    matrix, wanted, constant = damped(given)
    lowest = np.full(len(wanted), np.inf)
    pairs = list(itertools.combinations(range(4), 2))
    for masks in itertools.product(pairs, repeat=len(matrix) // 4):
        kept = [4 * group + place for group, pair in enumerate(masks) for place in pair]
        values = np.linalg.solve(matrix[np.ix_(kept, kept)], wanted[:, kept].T)
        lowest = np.minimum(lowest, -np.einsum("in,ni->n", values, wanted[:, kept]))
    return float(lowest.sum() + constant)


def surgeon_error(given: LayerProblem) -> float:
    """Optimal brain surgeon, exactly: one value of a row at a time, all others adjusted (OBC, 2022)."""
    matrix, wanted, _ = damped(given)
    inverse = np.linalg.inv(matrix)
    result = wanted @ inverse
    for row in result:
        current, alive, left = inverse.copy(), np.ones(len(row), bool), np.full(len(row) // 4, 2)
        for _ in range(len(row) // 2):
            allowed = alive & (np.repeat(left, 4) > 0)
            diagonal = np.where(alive, current.diagonal(), 1)
            place = int(np.where(allowed, row**2 / diagonal, np.inf).argmin())
            row -= current[place] * row[place] / current[place, place]
            current -= np.outer(current[:, place], current[place]) / current[place, place]
            alive[place] = False
            left[place // 4] -= 1
            row[~alive] = 0
    return error_of(given, result)


@pytest.mark.parametrize("mixed", [0.0, 0.5, 0.9])
@pytest.mark.parametrize(("columns", "samples"), [(4, 30), (8, 50), (12, 200), (16, 300), (16, 6)])
def test_small_layers_are_solved_exactly(columns: int, samples: int, mixed: float) -> None:
    given = problem(columns, 12, samples, columns + samples, mixed=mixed)
    assert error_of(given, solved(given).weights) <= least_error(given) * 1.0001 + 1e-6


def test_five_groups_come_close_to_every_mask_tried() -> None:
    given = problem(20, 6, 400, 3)
    assert error_of(given, solved(given).weights) <= least_error(given) * 1.01


@pytest.mark.parametrize(("columns", "rows", "samples"), [(24, 16, 100), (64, 32, 400), (64, 32, 20), (160, 24, 900)])
@pytest.mark.parametrize("mixed", [0.3, 0.9])
def test_better_than_the_exact_surgeon(columns: int, rows: int, samples: int, mixed: float) -> None:
    given = problem(columns, rows, samples, columns + samples, mixed=mixed)
    assert error_of(given, solved(given).weights) <= surgeon_error(given) * 1.01


def test_errors_are_those_of_the_answers() -> None:
    random = np.random.default_rng(4)
    inputs, dense = np.maximum(random.normal(size=(32, 500)), 0), random.normal(size=(16, 32)).astype(np.float32)
    found = solved(problem_of(inputs, dense))
    answers = dense @ inputs

    def relative(weights: np.ndarray) -> float:
        return float(np.linalg.norm(weights @ inputs - answers) / np.linalg.norm(answers))

    assert found.error == pytest.approx(relative(found.weights), rel=1e-4)
    assert found.magnitude_error == pytest.approx(relative(np.where(two_four_mask(dense, 1), dense, 0)), rel=1e-4)
    assert found.error < found.magnitude_error


def test_the_result_does_not_depend_on_the_number_of_threads() -> None:
    given = problem(68, 600, 500, 5)
    first = solved(given, threads=1).weights
    for threads in (1, 3):
        np.testing.assert_array_equal(solved(given, threads).weights, first)


def test_inputs_of_rank_below_four() -> None:
    random = np.random.default_rng(6)
    given = problem_of(random.normal(size=(32, 3)) @ random.normal(size=(3, 200)), random.normal(size=(8, 32)))
    assert solved(given).error < 0.02  # three directions: two values in each group are more than enough


def test_dead_inputs_are_the_ones_to_go() -> None:
    random = np.random.default_rng(7)
    inputs = random.normal(size=(32, 300))
    inputs[[1, 2, 5, 6, 9, 10]] = 0
    found = solved(problem_of(inputs, random.normal(size=(8, 32))))
    assert not found.weights[:, [1, 2, 5, 6, 9, 10]].any()


def test_inputs_that_are_all_zero_leave_magnitudes_to_decide() -> None:
    dense = np.random.default_rng(8).normal(size=(8, 24)).astype(np.float32)
    found = solved(problem_of(np.zeros((24, 50)), dense))
    np.testing.assert_allclose(found.weights, np.where(two_four_mask(dense, 1), dense, 0), atol=1e-6)
    assert found.error == 0.0


def test_one_column_is_answered() -> None:
    random = np.random.default_rng(9)
    found = solved(problem_of(random.normal(size=(16, 1)), random.normal(size=(8, 16))))
    assert found.error < 0.02


def test_constant_inputs_go_into_the_bias() -> None:
    random = np.random.default_rng(10)
    inputs = random.normal(size=(200, 16)).astype(np.float32)
    inputs[:, 3::4] = 1000.0  # large, and the same on every sample
    dense = random.normal(size=(8, 16)).astype(np.float32)
    with threadpool_limits(limits=1), ThreadPoolExecutor(2) as pool:
        moments = Moments(8, 16, pool)
        moments.add(inputs.copy(), inputs @ dense.T)
        found = solve(moments.whole(dense, centred=True), pool)
        shift = moments.shift(found.weights)
    off = inputs @ found.weights.T + shift - inputs @ dense.T
    by_magnitude = inputs @ np.where(two_four_mask(dense, 1), dense, 0).T - inputs @ dense.T
    assert np.linalg.norm(off) < 0.01 * np.linalg.norm(by_magnitude)
    np.testing.assert_allclose(off.mean(axis=0), 0, atol=0.02)


def test_sums_in_pieces_are_sums_of_the_whole() -> None:
    random = np.random.default_rng(11)
    inputs, outputs = (random.normal(size=(5000, size)).astype(np.float32) for size in (24, 8))
    dense = random.normal(size=(8, 24)).astype(np.float32)
    with ThreadPoolExecutor(2) as pool:
        moments = Moments(8, 24, pool)
        for start in range(0, 5000, 37):
            part = slice(start, start + 37)
            moments.add(inputs[part].copy(), outputs[part], judging=start % 5 == 0)
        given = moments.whole(dense, centred=False)
    np.testing.assert_allclose(given.moments, inputs.T.astype(float) @ inputs, rtol=1e-4, atol=0.2)
    np.testing.assert_allclose(given.target, outputs.T.astype(float) @ inputs, rtol=1e-4, atol=0.2)
    np.testing.assert_allclose(given.moments, given.moments.T)


@pytest.mark.parametrize(("outputs", "same"), [(8, False), (24, False), (24, True), (8, True)])
def test_products_with_the_outputs_follow_from_the_dense_inputs(outputs: int, same: bool) -> None:
    """A layer with more outputs than inputs sums up inputs only, and none twice where both models see the same."""
    random, columns = np.random.default_rng(outputs), 12
    given = random.normal(2.0, 1.0, (96, columns)).astype(np.float32)
    seen = given if same else given + random.normal(0, 0.3, given.shape).astype(np.float32)
    weights = random.normal(size=(outputs, columns)).astype(np.float32)
    answers = given @ weights.T
    with workers(2) as (pool, _):
        moments = Moments(outputs, columns, pool, same=same)
        assert moments.reads_dense_inputs == (outputs > columns and not same)
        for place in range(0, 96, 16):
            part = slice(place, place + 16)
            before = given[part] if moments.reads_dense_inputs else None
            moments.add(seen[part].copy(), answers[part], before, judging=place % 32 == 16)
        rows = np.array([1, outputs - 1])
        halves = moments.parts(weights, rows, centred=True)
        problem = moments.whole(weights, centred=True)
    x, z = seen.astype(np.float64), answers.astype(np.float64)
    x, z = x - x.mean(axis=0), z - z.mean(axis=0)
    assert problem.moments == pytest.approx(x.T @ x, rel=1e-4, abs=1e-3)
    assert problem.target == pytest.approx(z.T @ x, rel=1e-4, abs=1e-3)
    assert problem.energy == pytest.approx((z**2).sum(axis=0), rel=1e-4)
    assert halves is not None
    assert [half.target.shape for half in halves] == [(2, columns), (2, columns)]
