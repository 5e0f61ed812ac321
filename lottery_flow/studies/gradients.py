"""Gradient flow and signal propagation of a run."""

import jax
import jax.numpy as jnp

from lottery_flow import draw
from lottery_flow.analysis import batches as batches_lib
from lottery_flow.analysis import gradient_flow, gradient_noise, signal
from lottery_flow.errors import UserError
from lottery_flow.initial import init_options
from lottery_flow.sparsity import initializers, rules, schedules
from lottery_flow.studies.common import Findings, Options, device, network
from lottery_flow.study import Study, next_rewire

SPARSITIES = (0.0, 0.2, 0.4, 0.6, 0.8, 0.9, 0.95, 0.98, 0.99)


def gradient_norm(study: Study, options: Options) -> Findings:
    """Gradient flow by layer, and how far a step takes the loss down."""
    args = network(study, options, "batch", study.job.probe_examples)
    found = gradient_flow.gradient_norm(args[0], *args[1:])
    rate = float(jnp.asarray(study.job.learning_rate(study.step)))
    rate = rate or float(study.job.knobs["learning_rate"])  # a cosine ends with zero
    decrease = gradient_flow.loss_decrease(args[0], *args[1:], learning_rate=rate)
    text = (
        f"gradient norm {found.gradient_norm[0]:.4g}; a step of learning rate "
        f"{rate:.3g} takes {decrease.measured:.4g} off the loss, "
        f"{decrease.predicted[0]:.4g} to first order"
    )
    return Findings(
        {"": found, "decrease": decrease},
        {
            "": gradient_flow.plot_gradient_norm(found),
            "decrease": gradient_flow.plot_loss_decrease(decrease),
        },
        text,
    )


def gradient_flow_(study: Study, options: Options) -> Findings:
    """Gradient flow over all checkpoints."""
    objective, *_, batches = network(study, options, "batch", study.job.probe_examples)
    if options.norms == "frozen" and study.network.batch_stats:
        raise UserError(
            "--norms=frozen: each checkpoint has statistics of its own; leave it out, "
            "or ask gradient_norm of each"
        )
    networks = ((step, n.params, n.masks) for step, n in study.networks())
    frame = gradient_flow.trajectory(objective, networks, batches)
    whole = frame[frame["layer"] == "all"]["gradient_norm"].to_numpy()
    text = f"gradient norm {whole[0]:.4g} at first, {whole[-1]:.4g} in the end"
    return Findings({"": frame}, {"": gradient_flow.plot_trajectory(frame)}, text)


def noise(study: Study, options: Options) -> Findings:
    """Gradients of single examples."""
    args = network(study, options, "frozen", study.job.probe_examples)
    found = gradient_noise.gradient_noise(*args)
    text = f"noise scale {found.noise_scale[0]:.4g} examples"
    return Findings({"": found}, {"": gradient_noise.plot_gradient_noise(found)}, text)


def rewire(study: Study, options: Options) -> Findings:
    """What the next rewire of the run does to gradient flow."""
    step, before, after = next_rewire(study)
    study = study._replace(network=before)  # its statistics of norms, too
    objective, *_, batches = network(study, options, "batch", study.job.probe_examples)
    found = gradient_flow.rewire_gain(
        objective,
        (device(before.params), before.masks),
        (device(after.params), after.masks),
        batches,
    )
    text = (
        f"rewire at step {step}: gradient norm {found.before[0]:.4g} -> "
        f"{found.after[0]:.4g}"
    )
    return Findings({"": found}, {"": gradient_flow.plot_rewire_gain(found)}, text)


def compare_rules(study: Study, options: Options) -> Findings:
    """What RigL, SET and RigL inverted would do to this network."""
    objective, params, masks, batches = network(
        study, options, "batch", study.job.probe_examples
    )
    if not jax.tree.leaves(masks):
        raise UserError(f"--run={study.run.paths.root} is dense; give a sparse run")
    # Growth scores come from examples of their own, as in the paper.
    n, most = batches_lib.total(batches), study.job.spec.n_train // 2
    if n > most:
        raise UserError(
            f"--examples={options.examples}: as many again are needed for the growth "
            f"scores; give at most {most}"
        )
    grow = study.train_batches(2 * n, n)[1:]
    fraction = study.config.sparsity.drop_fraction
    due, drop = schedules.every(1), schedules.constant(fraction)
    make = {
        "rigl": rules.rigl,
        "set": rules.set_,
        "rigl_inverted": rules.rigl_inverted,
    }
    frame = gradient_flow.compare_rules(
        objective,
        params,
        masks,
        batches,
        {name: rule(due, drop) for name, rule in make.items()},
        gradient_flow.dense_gradient(objective, params, grow),
        key=jax.random.key(options.seed),
    )
    whole = frame[frame["layer"] == "all"].set_index("rule")["gain"]
    text = f"rewiring {100 * fraction:.0f} % changes the gradient norm by " + ", ".join(
        f"{gain:+.3g} ({name})" for name, gain in whole.items()
    )
    return Findings({"": frame}, {"": gradient_flow.plot_compare_rules(frame)}, text)


def signal_propagation(study: Study, options: Options) -> Findings:
    """Signals at initialisation, with the run's own init; uniform and uneven masks."""
    model, spec = study.job.model, study.job.spec
    stats = study.network.batch_stats
    key = jax.random.key(options.seed)
    n = options.batch_size or 500
    images = jax.random.normal(jax.random.fold_in(key, 0), (n, *spec.image_shape))
    labels = jax.random.randint(jax.random.fold_in(key, 1), (n,), 0, spec.n_classes)
    own = initializers.INITIALIZERS[study.config.model.init]

    def init(key, params, masks):
        del params  # trained, perhaps
        fresh = model.init(jax.random.fold_in(key, draw.PARAMS))["params"]
        init_key = jax.random.fold_in(key, draw.INIT)
        return own(init_key, fresh, masks, **init_options(study.config))

    def trace(params, batch, perturbations):
        return model.trace(params, stats, batch["image"], True, perturbations)

    tables, plots, texts = {}, {}, []
    for name, make in (
        ("uniform", signal.uniform_masks),
        ("uneven", signal.uneven_masks),
    ):
        found = signal.signal_propagation(
            trace,
            init,
            make,
            device(study.network.params),
            {"image": images, "label": labels},
            SPARSITIES,
            n_draws=5,
            key=key,
        )
        tables[name], plots[name] = found, signal.plot_signal_propagation(found)
        first, last = found.logit_std.mean(axis=1)[[0, -1]]
        texts.append(
            f"{name} masks: std of the logits {first:.3g} dense, {last:.3g} at "
            f"{100 * SPARSITIES[-1]:.0f} %"
        )
    return Findings(tables, plots, "; ".join(texts))
