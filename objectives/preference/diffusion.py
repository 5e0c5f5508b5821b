r"""Preferences between samples of diffusion models: the pair losses, on denoising errors.

With `e` the squared denoising error of an example at a time `t` and a noise, and `e_ref` the reference's, the implicit
reward over beta is `h = weight (e_ref - e)`, one term of the bound on `log pi(x_0) - log ref(x_0)`. The two samples of
a pair take the same `t` and the same noise: what the noise alone contributes cancels then.

Errors come from `objectives.score` (`regression_loss`, or `denoising_loss` with the parameterization of the model).
"""

from jax import Array
from jax.lax import stop_gradient

from esscher.core.arrays import at_least_float32, check_floating, check_per_example, check_same_shape, expand_like
from esscher.core.schedules import Schedule
from esscher.objectives.preference.links import Link, logistic_link
from esscher.objectives.preference.losses import pairwise

__all__ = ["denoising_log_ratio", "diffusion_dpo", "inversion_noise"]


def denoising_log_ratio(error: Array, ref_error: Array, *, weight: float | Array = 0.5) -> Array:
    """`weight (ref_error - error)`: what stands for `log pi - log ref` in the preference losses.

    Any of them can take it: with `diffusion_dpo` the pairwise ones, with `losses.pointwise` Diffusion-KTO and its kin.
    Summed over all `t` and averaged over the noise, with the likelihood's weights, it is a bound's difference; between
    Gaussian laws that differ in their mean alone it is the log-ratio itself.

    Args:
      error: squared error of the policy's prediction, `[B]`.
      ref_error: of the reference's, at the same `x_t`, a constant, `[B]`.
      weight: the likelihood's weight of the error at `t`, a constant; a scalar or `[B]`. For the noise error of a
        Gaussian step it is half the change of the log-SNR; the authors take 1/2 at every `t`.

    Returns:
      `[B]`, float32 at least.

    Raises:
      ValueError: shapes that do not fit, errors that are not floating.

    Reference: Diffusion Model Alignment Using Direct Preference Optimization, arXiv:2311.12908.
    """
    check_floating(error=error, ref_error=ref_error)
    check_same_shape(error=error, ref_error=ref_error)
    check_per_example(error, weight=weight)
    return stop_gradient(weight) * (stop_gradient(at_least_float32(ref_error)) - at_least_float32(error))


def diffusion_dpo(
    chosen_error: Array,
    rejected_error: Array,
    ref_chosen_error: Array,
    ref_rejected_error: Array,
    *,
    beta: float | Array = 5000.0,
    weight: float | Array = 0.5,
    link: Link = logistic_link,
) -> Array:
    r"""`link(-beta weight ((e_w - e_w_ref) - (e_l - e_l_ref)))`, by default `-log sigmoid` of that.

    The paper's factor `T`, the number of steps, is part of beta, as in the authors' code, whose `beta_dpo = 5000` and
    factor 1/2 are the defaults, for errors that are means over pixels and channels. DDIM-InPO is the same loss with
    latents that come from inverting each sample: its errors are against `inversion_noise`.

    With Gaussian data of variance `s^2` and a reward linear in it the population minimiser at each `t` is the exact
    denoiser of a tilt, the one of temperature `2 beta weight (alpha sigma s)^2 / (alpha^2 s^2 + sigma^2)^2`: one
    weight at every `t` is one tilt only up to that factor.

    Args:
      chosen_error: squared error of the noise prediction for the chosen samples, `[B]`.
      rejected_error: for the rejected ones, at the same times and noises, `[B]`.
      ref_chosen_error: of the reference, a constant, `[B]`.
      ref_rejected_error: likewise.
      beta: temperature, a scalar or `[B]`.
      weight: as in `denoising_log_ratio`.
      link: another one makes Diffusion-IPO (`squared_link`) and so on, see `links`.

    Returns:
      `[B]`, float32 at least.

    Raises:
      ValueError: shapes that do not fit, errors that are not floating.

    References: Diffusion Model Alignment Using Direct Preference Optimization, arXiv:2311.12908; InPO: Inversion
      Preference Optimization with Reparametrized DDIM for Efficient Diffusion Model Alignment, arXiv:2503.18454.
    """
    errors = {
        "chosen_error": chosen_error, "rejected_error": rejected_error, "ref_chosen_error": ref_chosen_error,
        "ref_rejected_error": ref_rejected_error,
    }  # fmt: skip
    check_floating(**errors)
    check_same_shape(**errors)
    chosen = denoising_log_ratio(chosen_error, ref_chosen_error, weight=weight)
    rejected = denoising_log_ratio(rejected_error, ref_rejected_error, weight=weight)
    return pairwise(chosen, rejected, beta=beta, link=link)


def inversion_noise(latents: Array, data: Array, t: Array, schedule: Schedule) -> Array:
    """`(x_t - alpha x_0) / sigma`: the noise that leads from a sample to its inverted latent; a constant.

    It is the target of the noise prediction in DDIM-InPO, in the place of the noise that Diffusion-DPO draws.

    Args:
      latents: `x_t[B, ...]`, from running the reference's probability flow up from the data (`samplers.inversion`).
      data: `x_0[B, ...]`.
      t: times with `sigma > 0`, `[B]` or scalar.
      schedule: the noise schedule.

    Returns:
      `[B, ...]`, float32 at least.

    Raises:
      ValueError: shapes that do not fit, arrays that are not floating.

    Reference: InPO: Inversion Preference Optimization with Reparametrized DDIM for Efficient Diffusion Model Alignment,
      arXiv:2503.18454.
    """
    check_floating(latents=latents, data=data)
    check_same_shape(latents=latents, data=data)
    check_per_example(data, t=t)
    t = at_least_float32(t)
    alpha, sigma = expand_like(schedule.alpha(t), data), expand_like(schedule.sigma(t), data)
    return stop_gradient((at_least_float32(latents) - alpha * at_least_float32(data)) / sigma)
