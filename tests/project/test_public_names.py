"""Every public name's docstring says what it is and what it returns."""

import dataclasses
import inspect

import pytest

import moe_edu

PUBLIC = [getattr(moe_edu, name) for name in moe_edu.__all__]
CLASSES = [item for item in PUBLIC if inspect.isclass(item)]
FUNCTIONS = [item for item in PUBLIC if not inspect.isclass(item)]
FIELDS = {
    cls: [field.name for field in dataclasses.fields(cls)] if dataclasses.is_dataclass(cls) else cls._fields
    for cls in CLASSES
    # The fields of the configuration are Hugging Face's, which describes them.
    if (dataclasses.is_dataclass(cls) or hasattr(cls, "_fields")) and cls is not moe_edu.MoEConfig
}


def public_methods(cls: type) -> list[str]:
    """Names of the methods defined in the class itself, including properties and class methods."""
    return [
        name
        for name, member in vars(cls).items()
        if not name.startswith("_") and (inspect.isroutine(member) or isinstance(member, property))
    ]


@pytest.mark.parametrize("function", FUNCTIONS)
def test_a_function_says_what_it_returns(function):
    assert "Returns:\n" in (function.__doc__ or "")


@pytest.mark.parametrize("cls", CLASSES)
def test_a_class_and_its_methods_say_what_they_are(cls):
    assert "__doc__" in vars(cls)
    # If a dataclass, named tuple or enumeration has no docstring, Python writes one.
    generated = (f"{cls.__name__}(", "An enumeration.")
    assert cls.__doc__
    assert not cls.__doc__.startswith(generated)
    assert [name for name in public_methods(cls) if not getattr(cls, name).__doc__] == []


@pytest.mark.parametrize("cls", FIELDS)
def test_a_value_describes_each_of_its_fields(cls):
    assert FIELDS[cls]
    assert [field for field in FIELDS[cls] if field not in cls.__doc__] == []
