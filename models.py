"""The models that can be trained, and the face by which the programs know them.

Each is a Flax module made of a configuration, with these methods and no line about it anywhere else:

    draw(keys, frames, context=0)     the noise over so many frames, from one PRNG key per sequence [B]; of these, the
                                      first `context` are observed and the others imagined
    part(inputs, start, stop)         what of it belongs to the frames from `start` on, before `stop`
    elbo(video, inputs, state=None, training=None)      -> Terms, state; what `init` and `apply` call
    observe(video, inputs, state=None, use_obs=None)    -> a rollout per level, state
    imagine(inputs, state)                              -> a rollout per level, state
    decode(rollouts)                                    -> frames [B, T, H, W, C]
    optimizer()                       what trains it, behind clipping
    shortest                          the frames that `init` needs

Rollouts have prior, posterior, stoch and deter [B, T_l, ...], as cwvae.LevelRollout does. A call continues where
`state` was left, so that long sequences can be computed in chunks of time, of multiples of `config.block` frames.
Collections besides `params` are running averages: they change in training only.
"""

from config import Config
from cwvae import CWVAE

Model = CWVAE


def make_model(config: Config) -> Model:
    """Return the model that `config.model` names."""
    return {"cwvae": CWVAE}[config.model](config)
