"""Names of batch fields that latent shards store for conditioners and encoders; without torch, for data commands."""

STATES_PREFIX = "states."  # and the name of a conditioner: batch field of its output, stored with the encoded latents
ENCODER_PREFIX = "encoder."  # instead of a conditioner's name: and the name of an encoder, whose features are stored
IDS_PREFIX, CUT_PREFIX = "ids.", "cut."  # likewise: the caption as token numbers, and whether its end is lost


def maker_of(states: str) -> str:
    """The option of what made stored states: conditioner.NAME, or encoder.NAME."""
    return states if states.startswith(ENCODER_PREFIX) else f"conditioner.{states}"
