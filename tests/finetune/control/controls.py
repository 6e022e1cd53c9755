"""A recipe of stages for a model with its control, and what a user gives with it."""

from modeling_vlmoe.conversion import UpcycleArguments, upcycle

STAGES = {
    "dense-tune": {"method": "align"},
    "upcycle": {"upcycle": {"text_experts": 4, "text_layers": "0,2"}},
    "moe-tune": {"method": "full", "train": ["moe-layers"], "learning_rates": {"experts": 1e-2, "routers": 1e-3}},
}
ON = {"with_dense_control": True}


def dense_model(parents, folder, **options):
    text, vision = parents
    options = options or {"dense": True}
    return upcycle(UpcycleArguments(str(text), str(vision), output_dir=str(folder), **options))


def given(model, data, out, *more):
    return [f"model={model}", f"data={data}", f"eval_data={data}", f"output_dir={out}", *more]
