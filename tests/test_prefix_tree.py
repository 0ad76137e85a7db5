from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from system.prefix_tree import Packed, PrefixTree, rows_by_budget, split
from system.trajectory import sampled

samples = st.lists(st.lists(st.integers(0, 2), max_size=5), max_size=8)


@given(samples)
def test_nodes_are_exactly_the_distinct_prefixes(strings: list[list[int]]) -> None:
    tree = PrefixTree.of([sampled(s) for s in strings])
    prefixes = {tuple(s[:t]) for s in strings for t in range(len(s) + 1)} | {()}
    assert len(tree) == len(prefixes)
    for string, nodes_T in zip(strings, tree.nodes_K, strict=True):
        assert nodes_T[0] == 0
        assert tree.token_N[nodes_T[1:]].tolist() == string
        assert tree.parent_N[nodes_T[1:]].tolist() == nodes_T[:-1].tolist()
        assert tree.length_N[nodes_T].tolist() == list(range(len(string) + 1))


@given(samples)
def test_end_bounds_exactly_the_descendants(strings: list[list[int]]) -> None:
    tree = PrefixTree.of([sampled(s) for s in strings])
    for node in range(len(tree)):
        ancestors, at = set(), node
        while at >= 0:
            ancestors.add(at)
            at = int(tree.parent_N[at])
        assert {n for n in range(len(tree)) if n <= node < tree.end_N[n]} == ancestors


@given(samples, st.lists(st.integers(5, 9), max_size=3), st.integers(1, 3))
def test_a_packed_node_sees_the_context_and_its_own_path_alone(
    strings: list[list[int]], suffix: list[int], context: int
) -> None:
    tree = PrefixTree.of([sampled(s) for s in strings])
    packed = Packed.of(tree, list(range(20, 20 + context)), suffix)
    at = np.arange(len(packed))
    seen = (at <= at[:, None]) & (at[:, None] < packed.end_L)
    for nodes_T in tree.nodes_K:
        for node in nodes_T:
            at = packed.start_N[node]
            path = packed.input_ids_L[seen[at]].tolist()
            length = int(tree.length_N[node])
            assert path == list(range(20, 20 + context)) + tree.token_N[nodes_T[1 : length + 1]].tolist()
            assert packed.position_ids_L[seen[at]].tolist() == list(range(context + length))
            for j in range(1, len(suffix)):
                assert packed.input_ids_L[seen[at + j]].tolist() == path + suffix[:j]
                assert packed.position_ids_L[seen[at + j]].tolist() == list(range(context + length + j))


def test_the_row_holds_each_prefix_once_and_a_branch_for_each() -> None:
    tree = PrefixTree.of([sampled([1, 2, 3]), sampled([1, 2, 4]), sampled([1, 2, 3])])
    assert len(Packed.of(tree, [7, 8])) == 2 + 4
    assert len(Packed.of(tree, [7, 8], suffix=[5, 6, 5])) == 2 + 4 + 2 * len(tree)
    assert len(Packed.of(tree, [7, 8], suffix=[5])) == 2 + 4


def test_a_tool_token_and_the_same_token_as_an_action_are_different_states() -> None:
    tree = PrefixTree.of([sampled([1, 2], [True, False]), sampled([1, 2], [True, True])])
    assert len(tree) == 4
    assert sorted(tree.depth_N[[nodes_T[-1] for nodes_T in tree.nodes_K]].tolist()) == [1, 2]


def test_queries_predict_each_node_from_its_parent_and_the_suffix_from_its_node() -> None:
    tree = PrefixTree.of([sampled([1, 2]), sampled([1, 3])])
    packed = Packed.of(tree, [9], suffix=[5, 6], branch_N=np.array([False, False, True, True]))
    positions, tokens = packed.edge_queries()
    assert [(packed.input_ids_L[p], t) for p, t in zip(positions, tokens, strict=True)] == [(9, 1), (1, 2), (1, 3)]
    positions, tokens = packed.suffix_queries()
    assert packed.input_ids_L[positions].tolist() == [[2, 5], [3, 5]]
    assert tokens.tolist() == [[5, 6], [5, 6]]


@given(st.lists(st.integers(1, 50), max_size=20), st.integers(10, 60))
def test_rows_hold_every_piece_once_and_keep_to_the_budget(lengths: list[int], budget: int) -> None:
    rows = rows_by_budget(lengths, budget)
    assert sorted(index for row in rows for index in row) == list(range(len(lengths)))
    for row in rows:
        assert sum(lengths[index] for index in row) <= budget or len(row) == 1


@given(samples, st.integers(1, 12))
def test_samples_are_split_into_trees_that_fit_and_each_is_in_one(strings: list[list[int]], most: int) -> None:
    trajectories = [sampled(s) for s in strings]
    trees = split(trajectories, lambda tree: len(tree) <= most)
    assert sorted(k for _, members in trees for k in members) == list(range(len(strings)))
    for tree, members in trees:
        longest = max((len(strings[k]) for k in members), default=0)
        assert len(tree) <= most or len(tree) == 1 + longest
        for k, nodes_T in zip(members, tree.nodes_K, strict=True):
            assert tree.token_N[nodes_T[1:]].tolist() == strings[k]


def test_samples_of_one_path_stay_together_however_little_fits() -> None:
    copies = [sampled(range(40))] * 16
    [(tree, members)] = split(copies, lambda tree: False)
    assert len(tree) == 41
    assert sorted(members) == list(range(16))
    assert [members for _, members in split([], lambda tree: False)] == [()]


def test_no_samples_make_a_tree_of_the_root_alone() -> None:
    assert len(PrefixTree.of([])) == 1
    with pytest.raises(ValueError, match="is_action"):
        sampled([1, 2], [True])
