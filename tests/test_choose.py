from __future__ import annotations

import pytest

from llm_streamline.choose import choose, least_influence
from llm_streamline.errors import UserError
from llm_streamline.recipe import Recipe
from llm_streamline.records import ModelShape, Similarity, Window
from llm_streamline.removal import candidates, check_request, single_layers

LAYERS = 8
SHAPE = ModelShape(name="m", model_type="llama", total=100 + 10 * LAYERS, layers=[10] * LAYERS)


def similarity(best: dict[int, int] | None = None, layers: int = LAYERS) -> Similarity:
    """Cosine falls with the window's length; windows of length n that start at best[n] are the most similar."""
    size = range(layers + 1)
    cosine = [[1 - 0.01 * abs(j - i) + 0.005 * ((best or {}).get(j - i) == i) for j in size] for i in size]
    zero = [[0.0 for _ in size] for _ in size]
    return Similarity(
        num_layers=layers,
        sequences=2,
        tokens=8,
        cosine=cosine,
        cosine_se=zero,
        relative_change=zero,
        relative_change_se=zero,
    )


def plan(**recipe):
    return choose(similarity({3: 3, 2: 5, 4: 2}), SHAPE, Recipe(model="m", **recipe))


def test_a_layer_replaces_a_window_one_longer_than_what_is_removed():
    found = plan(remove="2")
    assert (found.window.start, found.window.stop, found.net) == (3, 6, 2)
    assert str(found) == "layers 3:6 (3) of 8 -> 1 layer, net 2"
    assert found.layer_map() == [0, 1, 2, "3:6", 6, 7]
    assert found.sources() == [0, 1, 2, 3, 6, 7]
    assert found.parameters_after == SHAPE.total - 20
    assert found.plain_window == Window(start=5, stop=7)


def test_the_reason_says_whether_halves_of_the_sequences_agree():
    found, other = similarity({3: 3}), similarity({3: 4})
    told = {"same": [found.cosine, found.cosine], "other": [found.cosine, other.cosine]}
    recipe = Recipe(model="m", remove="2")
    whys = {}
    for name, halves in told.items():
        whys[name] = choose(found.model_copy(update={"halves": halves}), SHAPE, recipe).why
    assert whys["same"].endswith("; either half of the 2 sequences alone has it first)")
    assert whys["other"].endswith("; halves of the 2 sequences alone have 3:6 and 4:7 first)")
    assert "half" not in choose(found, SHAPE, recipe).why


def test_two_layers_and_none():
    two = plan(remove="2", replace="layer:2")
    assert (two.window, two.net, two.layer_map()) == (Window(start=2, stop=6), 2, [0, 1, "2:6", "2:6", 6, 7])
    none = plan(remove="2", replace="none")
    assert none.window == none.plain_window == Window(start=5, stop=7)
    assert none.layer_map() == [0, 1, 2, 3, 4, 7]


@pytest.mark.parametrize(("share", "net"), [("25%", 2), ("31%", 2), ("31.25%", 3), ("12.5%", 1), ("6.25%", 1)])
def test_a_percentage_is_of_all_layers_rounded_half_up(share, net):
    assert plan(remove=share).net == net


def test_a_quarter_is_the_default():
    assert plan().net == 2


def test_protected_ends_are_never_taken_unless_told_otherwise():
    best_at_the_ends = similarity({3: 0, 2: 6})
    recipe = Recipe(model="m", remove="2", replace="none")
    assert choose(best_at_the_ends, SHAPE, recipe).window.stop < LAYERS
    free = Recipe(model="m", remove="2", replace="none", protect_first=0, protect_last=0)
    assert choose(best_at_the_ends, SHAPE, free).window == Window(start=6, stop=8)


def test_max_params_takes_the_fewest_layers_that_fit():
    assert plan(max_params=SHAPE.total - 20).net == 2
    assert plan(max_params=SHAPE.total - 19).net == 2
    assert plan(max_params=SHAPE.total - 21).net == 3


def test_a_given_window_is_taken_and_compared_with_the_best_cut_inside_it():
    found = plan(window="2:6")
    assert (found.window, found.net) == (Window(start=2, stop=6), 3)
    assert found.plain_window == Window(start=3, stop=6)


@pytest.mark.parametrize(
    ("recipe", "words"),
    [
        ({"remove": "8"}, "leaves no layer of 8; give at most 5"),
        ({"remove": "100%"}, "leaves no layer"),
        ({"remove": "6"}, "would take the protected ends; remove at most 5 net"),
        ({"remove": "0"}, "removes none"),
        ({"remove": "some"}, "is no number of layers"),
        ({"remove": "2.5"}, "is no number of layers"),
        ({"window": "0:3"}, "takes protected layers; give one within 1:7"),
        ({"window": "5:8"}, "takes protected layers"),
        ({"window": "5:9"}, "ends past the model's 8 layers"),
        ({"window": "5:6"}, "so nothing is removed"),
        ({"window": "0:8", "replace": "none", "protect_first": 0, "protect_last": 0}, "leaves no layer"),
        (
            {"remove": "8", "replace": "none", "protect_first": 0, "protect_last": 0},
            "leaves no layer of 8; give at most 7",
        ),
        ({"protect_first": 9}, "protect all 8 layers"),
        ({"max_params": 10**6}, "is no less than the 180 that m has"),
        ({"max_params": 110}, "cannot be reached: without the layers that may go, m still has 130 parameters"),
    ],
)
def test_what_no_window_can_give_is_refused_before_anything_is_measured(recipe, words):
    with pytest.raises(UserError, match=words):
        check_request(SHAPE, Recipe(model="m", **recipe))


def test_the_advice_on_max_params_can_be_followed():
    ends = {"replace": "none", "protect_first": 0, "protect_last": 0}
    with pytest.raises(UserError, match="still has 110 parameters"):
        plan(max_params=105, **ends)
    assert plan(max_params=110, **ends).parameters_after == 110


def test_a_network_is_counted_and_refused_where_it_has_more_than_what_goes():
    recipe = Recipe(model="m", remove="2", replace="ffn", custom_code=True)
    found = choose(similarity({3: 3}), SHAPE.model_copy(update={"network": 12}), recipe)
    assert found.parameters_after == SHAPE.total - 30 + 12 and found.custom_code
    with pytest.raises(UserError, match="has more parameters than layers"):
        choose(similarity({3: 3}), SHAPE.model_copy(update={"network": 30}), recipe)


PERIODIC = SHAPE.model_copy(update={"period": 3})


def test_whole_periods_go_from_each_place():
    net = lambda **recipe: choose(similarity({}), PERIODIC, Recipe(model="m", **recipe)).net  # noqa: E731
    assert [net(remove=share) for share in ("3", "25%", "50%")] == [3, 3, 3]
    assert net(window="2:6") == 3 and net(window="2:5", replace="none") == 3
    assert net(max_params=str(SHAPE.total - 20)) == 3
    assert net(remove="3", select="last") == 3


@pytest.mark.parametrize(
    ("recipe", "words"),
    [
        ({"remove": "2"}, "--remove 2 with --for gguf is no multiple of 3, .*; give one, such as 3"),
        ({"remove": "3", "windows": 2}, "--windows 2 do not fit in 8 layers, with 3 net layers of each, .* at most 1"),
        ({"window": "2:5"}, "--window 2:5 with --for gguf removes 2 net, no multiple of the 3 layers"),
        ({"remove": "3", "select": "influence", "replace": "none"}, "needs 3 in a row to go"),
    ],
)
def test_parts_of_periods_are_refused(recipe, words):
    with pytest.raises(UserError, match=words):
        check_request(PERIODIC, Recipe(model="m", **recipe))
    longer = PERIODIC.model_copy(update={"layers": [10] * 12})
    with pytest.raises(UserError, match="no multiple of 6"):
        check_request(longer, Recipe(model="m", remove="3", windows=2))


HYBRID = SHAPE.model_copy(update={"sorts": [[3, 5], [0, 1, 2, 4, 6, 7]]})


def test_of_a_hybrids_layers_one_of_each_sort_stays():
    best = similarity({3: 3, 4: 3})  # a window that takes both layers that attend, the first of them for its stand-in
    assert choose(best, HYBRID, Recipe(model="m", remove="2")).window == Window(start=3, stop=6)
    without = choose(best, HYBRID, Recipe(model="m", remove="3", replace="none"))
    freely = choose(best, SHAPE, Recipe(model="m", remove="3", replace="none"))
    assert freely.window == Window(start=3, stop=6) != without.window


@pytest.mark.parametrize(
    ("recipe", "words"),
    [
        ({"window": "3:6", "replace": "none"}, "with --window 3:6 none of layers 3, 5 stays, and a hybrid needs"),
        ({"window": "2:6"}, "none of layers 3, 5 stays"),
        ({"remove": "6", "replace": "none", "protect_first": 0}, "with a window such as 0:6 none of layers 3, 5 stays"),
    ],
)
def test_what_takes_all_of_a_sort_is_refused(recipe, words):
    with pytest.raises(UserError, match=words):
        check_request(HYBRID, Recipe(model="m", **recipe))


def test_the_sort_that_is_named_is_the_one_that_goes():
    shape = SHAPE.model_copy(update={"sorts": [[0], [1, 2, 3, 4, 5, 6, 7]]})
    with pytest.raises(UserError, match="with --window 1:8 none of layers 1, 2, 3, 4, 5, 6, 7 stays"):
        check_request(shape, Recipe(model="m", window="1:8", replace="none", protect_last=0))
    both = SHAPE.model_copy(update={"sorts": [[0, 3, 4, 7], [1, 2, 5, 6]]})
    with pytest.raises(UserError, match="with windows such as 1:4 and 5:7 none of layers 1, 2, 5, 6 stays"):
        check_request(both, Recipe(model="m", remove="5", windows=2, replace="none", protect_first=1, protect_last=1))


def test_of_single_layers_the_last_of_a_sort_is_spared():
    recipe = Recipe(model="m", remove="5", select="influence", replace="none")
    assert check_request(HYBRID, recipe)
    assert single_layers(HYBRID, recipe, [3]) == [1, 2, 4, 6] and 5 in single_layers(SHAPE, recipe, [3])
    assert len({3, 5} & set(least_influence(similarity(), HYBRID, recipe, 5))) == 1
    with pytest.raises(UserError, match="with 6 single layers none of layers 3, 5 stays"):
        single_layers(HYBRID, recipe, [1, 2, 3, 4, 6])


def test_a_first_window_leaves_room_for_a_second_that_spares_a_sort():
    recipe = Recipe(model="m", remove="4", windows=2, replace="none")
    for first in candidates(HYBRID, recipe):
        assert candidates(HYBRID, recipe, [first])
    assert Window(start=2, stop=4) in candidates(SHAPE, recipe)
    assert Window(start=2, stop=4) not in candidates(HYBRID, recipe)
