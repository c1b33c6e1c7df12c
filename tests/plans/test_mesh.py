"""Ranks and places on the axes are the same thing said twice."""

import pytest
from hypothesis import given
from strategies import meshes

from plans.mesh import Parallelism, axis_ranks, coordinates, rank_at


@given(mesh=meshes())
def test_rank_and_place_are_a_bijection(mesh):
    places = [coordinates(mesh, rank) for rank in range(mesh.ranks)]
    assert [rank_at(mesh, place) for place in places] == list(range(mesh.ranks))
    assert {(place.replica, place.stage, place.group, place.tp) for place in places} == {
        (replica, stage, group, tp)
        for replica in range(mesh.replicas)
        for stage in range(mesh.spp)
        for group in range(mesh.kvp)
        for tp in range(mesh.tp)
    }


@given(mesh=meshes())
def test_axis_groups_partition_the_ranks_and_differ_on_one_axis_only(mesh):
    for axis, field, size in (
        ("tp", "tp", mesh.tp),
        ("kvp", "group", mesh.kvp),
        ("spp", "stage", mesh.spp),
    ):
        groups = {axis_ranks(mesh, rank, axis) for rank in range(mesh.ranks)}
        assert sorted(rank for group in groups for rank in group) == list(range(mesh.ranks))
        for group in groups:
            places = [coordinates(mesh, rank) for rank in group]
            assert [getattr(place, field) for place in places] == list(range(size))
            others = {"replica", "stage", "group", "tp"} - {field}
            assert len({tuple(getattr(place, each) for each in others) for place in places}) == 1


def test_tp_is_fastest_then_kvp_spp_and_replica():
    mesh = Parallelism(tp=2, kvp=2, spp=2, replicas=2)
    assert axis_ranks(mesh, 0, "tp") == (0, 1)
    assert axis_ranks(mesh, 0, "kvp") == (0, 2)
    assert axis_ranks(mesh, 0, "spp") == (0, 4)
    assert coordinates(mesh, 8).replica == 1


@pytest.mark.parametrize("rank", [-1, 4])
def test_rank_outside_the_mesh_is_an_error(rank):
    with pytest.raises(IndexError, match="outside 0 to 3"):
        coordinates(Parallelism(tp=2, spp=2), rank)
