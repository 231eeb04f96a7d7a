"""Returns, advantages and their off-policy corrections, along the first axis: time.

Arrays are (T, ...): any trailing axes (environments, seeds) ride along, all arguments of a call have the same shape;
or map over trajectories with `jax.vmap`.

Step t goes from observation t by action t to observation t + 1 and gives `reward_T[t]`, `terminated_T[t]` and
`truncated_T[t]`. `next_value_T[t]` is the value of the observation that step t led to *before* any reset: the final one
where an episode ended, not the first of the next episode.

An episode that terminated is worth nothing from there on. One that was truncated, or that the trajectory's end cut, is
worth `next_value_T[t]`. Nothing crosses the boundary between episodes, not even a NaN. A step that both terminated and
truncated its episode terminated it.

Discounts and lambdas are scalars, traced or not. Gradients flow through everything; the losses stop them. Every
function raises ValueError, naming the argument, for a trajectory of length zero, for shapes that differ, for flags that
are no booleans and for a discount that is no scalar.
"""

import jax
import jax.numpy as jnp

Scalar = float | jax.Array


def discounted_returns(
    reward_T: jax.Array, terminated_T: jax.Array, truncated_T: jax.Array, discount: Scalar
) -> jax.Array:
    """Discounted sum of the rewards that were seen, from each step to the end of its episode or of the trajectory.

    Nothing is bootstrapped; for that, use `lambda_returns` with lambda 1.
    """
    no_value_T = jnp.zeros(jnp.shape(reward_T))
    return lambda_returns(reward_T, no_value_T, terminated_T, truncated_T, discount, 1.0)


def lambda_returns(
    reward_T: jax.Array,
    next_value_T: jax.Array,
    terminated_T: jax.Array,
    truncated_T: jax.Array,
    discount: Scalar,
    lambda_: Scalar,
) -> jax.Array:
    """G_t = r_t + discount ((1 - lambda) V(s_t+1) + lambda G_t+1); r_t + discount V(s_t+1) where the episode was cut.

    Source: Sutton & Barto, Reinforcement Learning, 2nd edition, section 12.1, in its recursive form.
    """
    _check_scalars(discount=discount, lambda_=lambda_)
    reward_T, next_value_T = _check(terminated_T, truncated_T, reward_T=reward_T, next_value_T=next_value_T)
    cut_T = _cut(terminated_T, truncated_T)
    bootstrap_T = jnp.where(terminated_T, 0.0, next_value_T)
    mixed_T = jnp.where(cut_T, bootstrap_T, (1 - lambda_) * bootstrap_T)
    return _accumulate(reward_T + discount * mixed_T, jnp.full_like(reward_T, discount * lambda_), cut_T)


def generalised_advantages(
    reward_T: jax.Array,
    value_T: jax.Array,
    next_value_T: jax.Array,
    terminated_T: jax.Array,
    truncated_T: jax.Array,
    discount: Scalar,
    lambda_: Scalar,
) -> tuple[jax.Array, jax.Array]:
    """(advantage_T, target_T): sums of TD errors weighted by (discount lambda)^l, and the same plus `value_T`.

    Source: GAE, Schulman et al., arXiv 1506.02438, equation 16.
    """
    _check_scalars(discount=discount, lambda_=lambda_)
    reward_T, value_T, next_value_T = _check(
        terminated_T, truncated_T, reward_T=reward_T, value_T=value_T, next_value_T=next_value_T
    )
    error_T = reward_T + discount * jnp.where(terminated_T, 0.0, next_value_T) - value_T
    decay_T = jnp.full_like(reward_T, discount * lambda_)
    advantage_T = _accumulate(error_T, decay_T, _cut(terminated_T, truncated_T))
    return advantage_T, advantage_T + value_T


def vtrace(
    log_ratio_T: jax.Array,
    reward_T: jax.Array,
    value_T: jax.Array,
    next_value_T: jax.Array,
    terminated_T: jax.Array,
    truncated_T: jax.Array,
    discount: Scalar,
    lambda_: Scalar = 1.0,
    clip_rho: Scalar = 1.0,
    clip_c: Scalar = 1.0,
) -> tuple[jax.Array, jax.Array]:
    """(target_T, advantage_T) of a policy from the steps of another; `log_ratio_T` is log pi(a_t) - log mu(a_t).

    target v_t = V_t + sum over k of discount^(k-t) (c_t ... c_k-1) rho_k (r_k + discount V_k+1 - V_k), where
    rho = min(clip_rho, ratio) and c = lambda min(clip_c, ratio). The advantage, which already holds its importance
    weight, is rho_t (r_t + discount v_t+1 - V_t), with V(s_t+1) for v_t+1 where the episode was cut.

    Source: IMPALA, Espeholt et al., arXiv 1802.01561, equation 1, remark 2 and section 4.2.
    """
    _check_scalars(discount=discount, lambda_=lambda_, clip_rho=clip_rho, clip_c=clip_c)
    log_ratio_T, reward_T, value_T, next_value_T = _check(
        terminated_T,
        truncated_T,
        log_ratio_T=log_ratio_T,
        reward_T=reward_T,
        value_T=value_T,
        next_value_T=next_value_T,
    )
    cut_T = _cut(terminated_T, truncated_T)
    bootstrap_T = jnp.where(terminated_T, 0.0, next_value_T)
    # Clipped before the exponential, which then can't overflow.
    rho_T = jnp.exp(jnp.minimum(log_ratio_T, jnp.log(clip_rho)))
    c_T = lambda_ * jnp.exp(jnp.minimum(log_ratio_T, jnp.log(clip_c)))
    correction_T = _accumulate(rho_T * (reward_T + discount * bootstrap_T - value_T), discount * c_T, cut_T)
    target_T = value_T + correction_T
    next_target_T = jnp.where(cut_T, bootstrap_T, _shifted(target_T))
    return target_T, rho_T * (reward_T + discount * next_target_T - value_T)


def n_step_returns(
    reward_T: jax.Array,
    next_value_T: jax.Array,
    terminated_T: jax.Array,
    truncated_T: jax.Array,
    discount: Scalar,
    steps: int,
) -> jax.Array:
    """Rewards of the next `steps` steps, then the value; fewer steps where the episode or the trajectory ends before.

    `steps` is static and at least 1 (ValueError). With the greedy value as `next_value_T` these are DQN's targets.

    Source: Sutton & Barto, Reinforcement Learning, 2nd edition, equation 7.1.
    """
    if steps < 1:
        raise ValueError(f"returns: steps is {steps}, expected at least 1")
    _check_scalars(discount=discount)
    reward_T, next_value_T = _check(terminated_T, truncated_T, reward_T=reward_T, next_value_T=next_value_T)
    cut_T = _cut(terminated_T, truncated_T)
    bootstrap_T = jnp.where(terminated_T, 0.0, next_value_T)

    def one_more(_, return_T):
        return reward_T + discount * jnp.where(cut_T, bootstrap_T, _shifted(return_T))

    # More steps than the trajectory has change nothing.
    return jax.lax.fori_loop(1, min(steps, len(reward_T)), one_more, reward_T + discount * bootstrap_T)


def _check(terminated_T: jax.Array, truncated_T: jax.Array, **arrays_T: jax.Array) -> list[jax.Array]:
    """The arrays as floats of one dtype; some environments have integer rewards."""
    expected = jnp.shape(arrays_T["reward_T"])
    if not expected or expected[0] == 0:
        raise ValueError(f"returns: reward_T has shape {expected}, expected (T, ...) with T at least 1")
    for name, x in {**arrays_T, "terminated_T": terminated_T, "truncated_T": truncated_T}.items():
        if jnp.shape(x) != expected:
            raise ValueError(f"returns: {name} has shape {jnp.shape(x)}, expected that of reward_T, {expected}")
    for name, x in (("terminated_T", terminated_T), ("truncated_T", truncated_T)):
        if jnp.result_type(x) != jnp.bool_:
            raise ValueError(f"returns: {name} has dtype {jnp.result_type(x)}, expected bool")
    dtype = jnp.result_type(float, *arrays_T.values())
    return [jnp.asarray(x, dtype) for x in arrays_T.values()]


def _check_scalars(**scalars: Scalar) -> None:
    for name, x in scalars.items():
        if jnp.ndim(x):
            raise ValueError(
                f"returns: {name} has shape {jnp.shape(x)}, expected a scalar; map over more with jax.vmap"
            )


def _cut(terminated_T: jax.Array, truncated_T: jax.Array) -> jax.Array:
    """Where the next step belongs to another episode, or to no trajectory."""
    return (jnp.asarray(terminated_T) | truncated_T).at[-1].set(True)


def _shifted(x_T: jax.Array) -> jax.Array:
    """x_t+1 at t. What stands at the last step is not meant to be used."""
    return jnp.concatenate([x_T[1:], x_T[-1:]])


def _accumulate(x_T: jax.Array, decay_T: jax.Array, cut_T: jax.Array) -> jax.Array:
    """y_t = x_t + decay_t y_t+1, without the second term where the trajectory is cut."""

    def step(y, inputs):
        x, decay, cut = inputs
        y = x + decay * jnp.where(cut, 0.0, y)
        return y, y

    inputs = (x_T, decay_T.astype(x_T.dtype), cut_T)
    return jax.lax.scan(step, jnp.zeros_like(x_T[0]), inputs, reverse=True)[1]
