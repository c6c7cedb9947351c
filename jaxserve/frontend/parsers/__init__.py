"""What a model wrote, taken apart while it arrives: reasoning, content and tool calls.

A parser is one incremental state machine, used for streams and for whole texts alike, so both give
the same. Its rules, for every format:

- A call begins when its name is known, whole, and its arguments begin. Until then its text is held
  back, and given as content as soon as it cannot be a call.
- From then on it is a call. Argument text is passed on as it arrives; where the model wrote no
  valid JSON, or was cut off, the arguments are as broken as what it wrote.
- All other text is content, before, between and after calls; only white space that has no text
  on its side of a call is dropped. A call of a tool that was not offered is a call, as in vLLM.
- Time is linear in the text, whatever it holds; no text raises.
"""
