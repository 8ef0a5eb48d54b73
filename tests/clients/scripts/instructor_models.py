"""instructor: a pydantic model as the answer, by JSON schema."""

import os
from typing import Literal

import instructor
from openai import OpenAI
from pydantic import BaseModel


class Light(BaseModel):
    """A light."""

    colour: Literal["red", "green"]
    on: bool


client = OpenAI(base_url=os.environ["OPENAI_BASE_URL"], api_key="none", max_retries=0)
for mode in (instructor.Mode.JSON_SCHEMA, instructor.Mode.TOOLS):
    patched = instructor.from_openai(client, mode=mode)
    light = patched.chat.completions.create(
        model=os.environ["MODEL"],
        messages=[{"role": "user", "content": "A light"}],
        response_model=Light,
        max_tokens=1000,  # a random model may write much white space
        seed=1,
        max_retries=0,
    )
    assert isinstance(light, Light), light
