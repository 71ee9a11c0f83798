"""The released pairing: what each step sees."""

from expunge.unlearn.schedule import Pairing, paired_steps


def test_an_epoch_is_one_pass_over_forget_with_item_i_beside_retain_item_i_modulo():
    steps = paired_steps(Pairing(epochs=2, micro_batch=2, accumulation=2), 10, 4, seed=1)
    assert len(steps) == 2 * 3  # five micro-batches an epoch, two a step
    assert [len(step) for step in steps] == [2, 2, 1] * 2
    for epoch in (steps[:3], steps[3:]):
        batches = [batch for step in epoch for batch in step]
        assert sorted(i for b in batches for i in b.forget) == list(range(10))
        assert all(b.retain == tuple(i % 4 for i in b.forget) for b in batches)


def test_the_order_is_a_function_of_the_seed():
    config = Pairing(epochs=1)
    assert paired_steps(config, 9, 9, seed=1) == paired_steps(config, 9, 9, seed=1)
    assert paired_steps(config, 9, 9, seed=1) != paired_steps(config, 9, 9, seed=2)


def test_several_retain_items_a_forget_item_reach_more_of_the_retain_set():
    config = Pairing(epochs=3, retain_per_forget=3)
    steps = paired_steps(config, 2, 20, seed=1)
    batches = [batch for step in steps for batch in step]
    assert all(len(b.retain) == 3 for b in batches)
    assert len({i for b in batches for i in b.retain}) > 6
