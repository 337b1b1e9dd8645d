"""plan_buckets: every matrix once, one key per bucket, never above the bound."""

from hypothesis import given
from hypothesis import strategies as st

from normuon_plugins.core.buckets import Stack, plan_buckets

STACKS = st.lists(st.builds(Stack, st.sampled_from("abc"), st.integers(1, 9), st.just(10)), max_size=8)


@given(stacks=STACKS, bucket_bytes=st.integers(1, 100))
def test_every_matrix_is_planned_once_within_the_bound(stacks, bucket_bytes):
    buckets = plan_buckets(stacks, bucket_bytes)
    planned = [(part.index, matrix) for bucket in buckets for part in bucket for matrix in range(part.start, part.stop)]
    assert sorted(planned) == [(index, n) for index, stack in enumerate(stacks) for n in range(stack.count)]
    for bucket in buckets:
        assert len({stacks[part.index].key for part in bucket}) == 1
        matrices = sum(part.stop - part.start for part in bucket)
        assert matrices == 1 or matrices * 10 <= bucket_bytes


@given(stacks=STACKS, bucket_bytes=st.integers(10, 100))
def test_no_bucket_could_have_taken_the_next_one_of_its_key(stacks, bucket_bytes):
    capacity = bucket_bytes // 10
    full = {}
    for bucket in plan_buckets(stacks, bucket_bytes):
        full.setdefault(stacks[bucket[0].index].key, []).append(sum(part.stop - part.start for part in bucket))
    for sizes in full.values():
        assert all(size == capacity for size in sizes[:-1])
