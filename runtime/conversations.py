"""How conversations become prompts in one engine: tokenizer, template, pixel budget and layout of its bundle.

In: messages. Out: `Prompt`s, or their ids alone. Knows nothing of graphs. It never changes, so any thread may
use it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from autoglm_edge.errors import RequestError

from .bundle import Bundle
from .checks import check_ids, is_whole
from .manifest import ImageSpec, TokenSpec
from .prompt.build import Prompt, build_prompt, prompt_ids
from .prompt.messages import read_messages
from .prompt.template import IMAGE_LAYOUTS, ChatTemplate, ImageLayout
from .prompt.tokenizer import Tokenizer


@dataclass(frozen=True, eq=False)
class Conversations:
    """What prompts are made with.

    Attributes:
        tokenizer: of the bundle.
        template: of the bundle.
        image: how pictures are resized, the bundle's own way or to fewer tokens.
        tokens: special ids.
        image_layout: what stands between picture and text.
    """

    tokenizer: Tokenizer
    template: ChatTemplate
    image: ImageSpec
    tokens: TokenSpec
    image_layout: ImageLayout

    @classmethod
    def of(cls, bundle: Bundle, image_layout: ImageLayout, max_image_tokens: int | None) -> Self:
        """Read them from a bundle.

        Args:
            bundle: opened bundle.
            image_layout: see the class.
            max_image_tokens: most tokens of a picture; lowers the bundle's pixel budget, never raises it.

        Raises:
            BundleError: tokenizer and manifest are not of one export.
            RequestError: an option is wrong.
        """
        if image_layout not in IMAGE_LAYOUTS:
            raise RequestError(f"image_layout is {image_layout!r}, must be one of {', '.join(IMAGE_LAYOUTS)}")
        if max_image_tokens is not None and not is_whole(max_image_tokens):
            raise RequestError(f"max_image_tokens is {max_image_tokens!r}, must be an integer")
        image = bundle.manifest.image
        if max_image_tokens is not None and max_image_tokens < image.max_tokens:
            image = image.with_max_tokens(max_image_tokens)
        tokenizer = Tokenizer.from_folder(bundle.path)
        check_ids(bundle, tokenizer)
        template = ChatTemplate.from_folder(bundle.path)
        return cls(tokenizer, template, image, bundle.manifest.tokens, image_layout)

    def prompt(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        context: int,
        max_tokens: int,
        variables: Mapping[str, Any] | None,
    ) -> Prompt:
        """What `Engine.prompt` gives, in a context of so many tokens.

        Raises:
            RequestError: a message or an image is wrong.
            ContextLengthError: no room for `max_tokens` more; known before an image is resized.
        """
        return build_prompt(
            read_messages(messages),
            tokenizer=self.tokenizer,
            template=self.template,
            image=self.image,
            tokens=self.tokens,
            image_layout=self.image_layout,
            variables=variables,
            context=context,
            max_tokens=max_tokens,
        )

    def ids(self, messages: Sequence[Mapping[str, Any]]) -> NDArray[np.int64]:
        """Token ids (T,) of a conversation of whatever length, image placeholders expanded.

        Raises:
            RequestError: a message or an image is wrong.
        """
        return prompt_ids(
            read_messages(messages),
            tokenizer=self.tokenizer,
            template=self.template,
            image=self.image,
            tokens=self.tokens,
            image_layout=self.image_layout,
        )
