"""The Harmony token format: conversations to tokens with a label for each, and completions back to channels.

One codec serves training and serving, over any tokenizer that carries Harmony's control tokens, so that a model is
asked exactly as it was trained. Text never becomes a control token: it is encoded with special tokens switched off,
and control tokens are only ever placed here, by name.

Format: https://github.com/openai/harmony/blob/main/docs/format.md. Where this codec differs on purpose from
openai-harmony and from the hub's chat template: docs/harmony.md.
"""

from cluster.harmony.codec import Codec
from cluster.harmony.conversation import (
    CHANNELS,
    IDENTITY,
    KNOWLEDGE_CUTOFF,
    Channel,
    Conversation,
    Effort,
    FunctionTool,
    Message,
    ResponseFormat,
    Role,
    ToolCall,
)
from cluster.harmony.parser import StreamParser
from cluster.harmony.reply import Delta, Outcome, ParsedCall, Part, Reply
from cluster.harmony.tokens import (
    CALL,
    CHANNEL,
    CHANNEL_LABELS,
    CONSTRAIN,
    CONTROL_TOKENS,
    END,
    MESSAGE,
    RETURN,
    START,
    TRAINABLE,
    Example,
    Label,
)

__all__ = [
    "CALL",
    "CHANNEL",
    "CHANNELS",
    "CHANNEL_LABELS",
    "CONSTRAIN",
    "CONTROL_TOKENS",
    "END",
    "IDENTITY",
    "KNOWLEDGE_CUTOFF",
    "MESSAGE",
    "RETURN",
    "START",
    "TRAINABLE",
    "Channel",
    "Codec",
    "Conversation",
    "Delta",
    "Effort",
    "Example",
    "FunctionTool",
    "Label",
    "Message",
    "Outcome",
    "ParsedCall",
    "Part",
    "Reply",
    "ResponseFormat",
    "Role",
    "StreamParser",
    "ToolCall",
]
