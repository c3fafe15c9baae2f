"""C source for the CPU, made from the Triton rules, so that a rule is written once.

A rule is straight-line arithmetic (`kernels/rules.py` says what may stand in it), so its text
translates statement by statement. The loops around it are the kernels' own: the same tables, the
same chunk per iteration, the same partial sums. Products and sums are not contracted to FMA, so
accumulators, parameters and states come out as in Triton's interpreter, bit for bit.
"""

from __future__ import annotations

import torch

from ...kernels import layout
from ...kernels.layout import ScalarsRow, StepRow
from ...rules import as_c, text
from ...rules.rule import Rule
from ..keep import Keep


def _layout() -> str:
    """The numbers of `kernels/layout.py` in C: CHUNK, StepRow_PARAM and so on."""
    lines = []
    for name, value in vars(layout).items():
        if isinstance(value, type):
            columns = {f"{name}_{key}": n for key, n in vars(value).items() if key.isupper()}
            lines += [f"enum {{ {key} = {n} }};" for key, n in columns.items()]
        elif isinstance(value, int):
            lines.append(f"static const uint32_t {name} = {value}u;")
    return "\n".join(lines)


_PRELUDE = """
#include <math.h>
#include <stdint.h>
#include <string.h>
enum { LANES = 16 };
%(layout)s
static inline float bits_to_float(uint32_t bits) { float x; memcpy(&x, &bits, 4); return x; }
static inline uint32_t float_to_bits(float x) { uint32_t bits; memcpy(&bits, &x, 4); return bits; }
static inline float from_bf16(uint16_t x) { return bits_to_float((uint32_t)x << 16); }
/* Round to nearest, ties to even; NaN keeps its sign and becomes quiet. */
static inline uint16_t to_bf16(float x) {
  uint32_t bits = float_to_bits(x);
  uint32_t rounded = (bits + 0x7FFFu + ((bits >> 16) & 1u)) >> 16;
  return x != x ? (uint16_t)((bits >> 16) | 0x0040u) : (uint16_t)rounded;
}
static inline float same(float x) { return x; }
/* kernels/_math.py: halves of a master, and no NaN of a remainder that is not the high half's. */
static inline float join_master(uint16_t high, int16_t remainder) {
  uint32_t bits = (uint32_t)high << 16;
  float master = bits_to_float(bits + (uint32_t)(int32_t)remainder);
  return master != master ? bits_to_float(bits) : master;
}
/* rounding.py: hash of 32 bits, and stochastic rounding. */
static inline uint32_t mix_bits(uint32_t x) {
  x ^= x >> 16; x *= MIX_FIRST; x ^= x >> 15; x *= MIX_SECOND; return x ^ (x >> 16);
}
static inline uint16_t to_bf16_stochastic(float x, uint32_t key, uint32_t i) {
  uint32_t rounded = (float_to_bits(x) + (mix_bits(key + i * GOLDEN) >> 16)) >> 16;
  return x != x ? (uint16_t)QUIET_NAN_HIGH : (uint16_t)rounded;
}

/* Every loop has this signature: tables, a third array, a scale, and a range of chunks. */
typedef void (*loop_fn)(const int64_t *, const int32_t *, void *, float, int64_t, int64_t);
typedef struct {
  loop_fn loop;
  const int64_t *table;
  const int32_t *chunks;
  void *third;
  float scale;
  int64_t n_chunks;
  int (*thread_num)(void);
  int (*n_threads)(void);
} job;
/* What each thread of an OpenMP team runs: its share of the chunks. */
void run_share(void *data) {
  const job *j = data;
  int64_t thread = j->thread_num(), n = j->n_threads();
  j->loop(j->table, j->chunks, j->third, j->scale, j->n_chunks * thread / n,
          j->n_chunks * (thread + 1) / n);
}
"""

# dtype: (C type, load, store)
_C_TYPES = {
    torch.float32: ("float", "same", "same"),
    torch.bfloat16: ("uint16_t", "from_bf16", "to_bf16"),
    torch.float16: ("_Float16", "(float)", "(_Float16)"),
}

_ACCUMULATE = """
void %(name)s(const int64_t *table, const int32_t *chunks, void *third, float scale,
              int64_t begin, int64_t end) {
  float *partials = third;
  for (int64_t pid = begin; pid < end; ++pid) {
    const int64_t *row = table + AccumulateRow_COLUMNS * (int64_t)chunks[2 * pid];
    const int64_t start = chunks[2 * pid + 1] * (int64_t)CHUNK;
    const int64_t left = row[AccumulateRow_NUMEL] - start;
    const %(type)s *restrict grad = (const %(type)s *)row[AccumulateRow_GRAD] + start;
    float *restrict acc = (float *)row[AccumulateRow_ACC] + start;
    const int64_t n = left < CHUNK ? left : CHUNK;
    float sums[LANES] = {0};
    int64_t i = 0;
    for (; i + LANES <= n; i += LANES)
      for (int lane = 0; lane < LANES; ++lane) {
        float value = %(load)s(grad[i + lane]) * scale;
        if (!%(first)d) value += acc[i + lane];
        acc[i + lane] = value;
        if (%(norm)d) sums[lane] += value * value;
      }
    for (; i < n; ++i) {
      float value = %(load)s(grad[i]) * scale;
      if (!%(first)d) value += acc[i];
      acc[i] = value;
      if (%(norm)d) sums[0] += value * value;
    }
    if (%(norm)d) {
      double total = 0;
      for (int lane = 0; lane < LANES; ++lane) total += sums[lane];
      partials[row[AccumulateRow_PARTIAL] + chunks[2 * pid + 1]] = (float)total;
    }
  }
}
"""

_SUM_OF_SQUARES = """
void %(name)s(const int64_t *table, const int32_t *chunks, void *third, float unused,
              int64_t begin, int64_t end) {
  float *partials = third;
  for (int64_t pid = begin; pid < end; ++pid) {
    const int64_t *row = table + SquaresRow_COLUMNS * (int64_t)chunks[2 * pid];
    const int64_t start = chunks[2 * pid + 1] * (int64_t)CHUNK;
    const int64_t left = row[SquaresRow_NUMEL] - start;
    const %(type)s *restrict data = (const %(type)s *)row[SquaresRow_DATA] + start;
    const int64_t n = left < CHUNK ? left : CHUNK;
    float sums[LANES] = {0};
    int64_t i = 0;
    for (; i + LANES <= n; i += LANES)
      for (int lane = 0; lane < LANES; ++lane) {
        float value = %(load)s(data[i + lane]);
        sums[lane] += value * value;
      }
    for (; i < n; ++i) { float value = %(load)s(data[i]); sums[0] += value * value; }
    double total = 0;
    for (int lane = 0; lane < LANES; ++lane) total += sums[lane];
    partials[row[SquaresRow_PARTIAL] + chunks[2 * pid + 1]] = (float)total;
  }
}
"""

_STEP = """
void step(const int64_t *table, const int32_t *chunks, void *third, float unused, int64_t begin,
          int64_t end) {
  const float *all_scalars = third;
  for (int64_t pid = begin; pid < end; ++pid) {
    const int64_t *row = table + %(columns)d * (int64_t)chunks[2 * pid];
    const int64_t start = chunks[2 * pid + 1] * (int64_t)CHUNK;
    const int64_t left = row[StepRow_NUMEL] - start;
    const int64_t n = left < CHUNK ? left : CHUNK;
    %(type)s *restrict params = (%(type)s *)row[StepRow_PARAM] + start;
    %(master_type)s *restrict masters = (%(master_type)s *)row[StepRow_MASTER] + start;
    const float *restrict accs = (const float *)row[StepRow_ACC] + start;
    %(state_pointers)s
    const float *scalars = all_scalars + row[StepRow_TENSOR] * %(scalar_columns)d;
    const float coef = scalars[ScalarsRow_COEF];
    const uint32_t key = mix_bits(
        mix_bits((uint32_t)row[StepRow_KEY] ^ (uint32_t)scalars[ScalarsRow_STEP])
        + (uint32_t)chunks[2 * pid + 1]);
    %(scalar_values)s
    for (int64_t i = 0; i < n; ++i) {
      %(load_param)s
      float grad = accs[i] * coef;
      %(load_states)s
      %(body)s
      %(store_param)s
      %(store_states)s
    }
  }
}
"""

_LOAD_PARAM = {
    Keep.PARAM: "float param = %(load)s(params[i]);",
    Keep.SPLIT: "float param = join_master(params[i], masters[i]);",
    Keep.STOCHASTIC: "float param = %(load)s(params[i]);",
    Keep.FP32: "float param = masters[i];"
    " if (%(load)s(%(store)s(param)) != %(load)s(params[i])) param = %(load)s(params[i]);",
}
_STORE_PARAM = {
    Keep.PARAM: "params[i] = %(store)s(param);",
    Keep.SPLIT: "int32_t bits = (int32_t)float_to_bits(param == param ? param : NAN);"
    " int32_t high = (int32_t)((uint32_t)bits + ROUND_HALF) >> 16;"
    " params[i] = (uint16_t)high;"
    " masters[i] = (int16_t)(uint32_t)((uint32_t)bits - ((uint32_t)high << 16));",
    Keep.STOCHASTIC: "params[i] = to_bf16_stochastic(param, key, (uint32_t)i);",
    Keep.FP32: "params[i] = %(store)s(param); masters[i] = param;",
}


def accumulate_name(dtype: torch.dtype, first: bool, norm: bool) -> str:
    """Name of the accumulate loop of a variant."""
    kind = str(dtype).removeprefix("torch.")
    return f"accumulate_{kind}{'_first' if first else ''}{'_norm' if norm else ''}"


def sum_of_squares_name(dtype: torch.dtype) -> str:
    """Name of the sum-of-squares loop of a dtype."""
    return f"sum_of_squares_{str(dtype).removeprefix('torch.')}"


def reduce_source(dtype: torch.dtype) -> str:
    """C source of every accumulate and sum-of-squares loop of a gradient dtype."""
    c_type, load, _ = _C_TYPES[dtype]
    parts = [_PRELUDE % {"layout": _layout()}]
    for first in (False, True):
        for norm in (False, True):
            parts.append(
                _ACCUMULATE
                % {
                    "name": accumulate_name(dtype, first, norm),
                    "type": c_type,
                    "load": load,
                    "first": first,
                    "norm": norm,
                }
            )
    parts.append(
        _SUM_OF_SQUARES % {"name": sum_of_squares_name(dtype), "type": c_type, "load": load}
    )
    return "".join(parts)


def step_source(rule: Rule, dtype: torch.dtype, keep: Keep) -> str:
    """C source of the step loop of a rule for one parameter dtype and `Keep`."""
    c_type, load, store = _C_TYPES[dtype]
    loop = as_c.translate(text.function(rule.family.kernels, rule.name))
    indices = range(len(rule.states))
    return _PRELUDE % {"layout": _layout()} + _STEP % {
        "columns": StepRow.STATES + len(rule.states),
        "type": c_type,
        "master_type": "int16_t" if keep is Keep.SPLIT else "float",
        "state_pointers": "\n    ".join(
            f"float *restrict state{i} = (float *)row[{StepRow.STATES + i}] + start;"
            for i in indices
        ),
        "scalar_columns": ScalarsRow.OWN + rule.family.n_scalars,
        "scalar_values": "\n    ".join(
            f"const float {name} = scalars[{ScalarsRow.OWN + i}];"
            for name, i in _places(loop.scalars)
        ),
        "load_param": _LOAD_PARAM[keep] % {"load": load, "store": store},
        "load_states": " ".join(f"float {s} = state{i}[i];" for s, i in _places(loop.states)),
        "body": "\n      ".join(loop.body),
        "store_param": _STORE_PARAM[keep] % {"load": load, "store": store},
        "store_states": " ".join(
            f"state{i}[i] = {result};" for i, result in enumerate(loop.results)
        ),
    }


def _places(names: list[str]) -> list[tuple[str, int]]:
    """Each name once, with its place: Python's `_, x, _ = scalars` leaves the last."""
    return list({name: i for i, name in enumerate(names)}.items())
