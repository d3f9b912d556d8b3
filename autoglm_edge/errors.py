"""Everything that this package raises on purpose.

    EdgeError
    ├── CheckpointError        the model folder is missing, foreign, incomplete or damaged
    ├── ExportError            an export cannot start or go on (disk, existing output, wrong resume)
    ├── QuantError             a recipe or a number format does not fit
    ├── BundleError            a bundle is missing, foreign, incomplete or damaged
    ├── ParityError            a reference is missing, foreign or damaged, or is not one of this bundle
    ├── DeviceError            the device asked for is not there
    ├── DependencyError        an optional part is not installed
    ├── SimulationError        a device cannot be simulated: its profile is wrong, or this host cannot limit
    └── RequestError           what the caller asked for cannot be done
        ├── ImageError         an image cannot be read or used
        ├── PromptError        messages or template cannot be turned into a prompt
        └── ContextLengthError prompt and answer do not fit the context; known before any compute

Every message is one sentence: what is wrong, the value seen, where, and what to do. Catch one class:

    try:
        engine = autoglm_edge.load("out/")
    except autoglm_edge.EdgeError as error:
        print(error)
"""

from __future__ import annotations


class EdgeError(Exception):
    """Base of every error raised on purpose by this package."""


class CheckpointError(EdgeError):
    """The checkpoint is missing, of another model, incomplete or damaged."""


class ExportError(EdgeError):
    """An export cannot start or cannot go on."""


class QuantError(EdgeError):
    """A recipe or a number format does not fit the tensor it is meant for."""


class BundleError(EdgeError):
    """A bundle is missing, of another format, incomplete or damaged."""


class ParityError(EdgeError):
    """A recorded reference is missing, foreign or damaged, or belongs to another model than the bundle."""


class DeviceError(EdgeError):
    """The device or execution provider asked for is not available."""


class DependencyError(EdgeError):
    """An optional part is needed and not installed."""


class SimulationError(EdgeError):
    """A device profile is missing or wrong, or a simulated run cannot be set up on this host."""


class RequestError(EdgeError):
    """What the caller asked for cannot be done as asked."""


class ImageError(RequestError):
    """An image cannot be read, or is outside what the model can take."""


class PromptError(RequestError):
    """The messages, or the checkpoint's template, cannot be turned into a prompt."""


class ContextLengthError(RequestError):
    """Prompt plus answer do not fit the context window. Raised before anything is computed.

    Attributes:
        prompt_tokens: tokens of the prompt, image tokens included.
        max_tokens: answer tokens asked for.
        limit: tokens that the engine holds.
    """

    code = "context_length_exceeded"

    def __init__(self, prompt_tokens: int, max_tokens: int, limit: int) -> None:
        super().__init__(
            f"the prompt has {prompt_tokens} tokens and asks for {max_tokens} more, but the context holds "
            f"{limit}; shorten the prompt, use fewer or smaller images, lower max_tokens, or load with a "
            "larger context"
        )
        self.prompt_tokens = prompt_tokens
        self.max_tokens = max_tokens
        self.limit = limit
