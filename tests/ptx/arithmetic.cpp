// Instructions of one lane: integers, floats, halves, conversions, branches.
#include <algorithm>
#include <functional>

#include "halves.h"
#include "operations.h"

namespace ptx {
namespace {

template <class T>
concept Integer = std::integral<T> && !std::same_as<T, bool>;
template <class T>
concept Number = Integer<T> || std::floating_point<T>;
template <class T>
concept Bits = std::integral<T>;
template <class T>
using Twice = std::conditional_t<
    sizeof(T) == 2, std::conditional_t<std::is_signed_v<T>, int32_t, uint32_t>,
    std::conditional_t<std::is_signed_v<T>, std::conditional_t<sizeof(T) == 4, int64_t, __int128>,
                       std::conditional_t<sizeof(T) == 4, uint64_t, unsigned __int128>>>;

// Integers wrap around.
constexpr auto kAdd = []<Number T>(T a, T b) {
  if constexpr (Integer<T>)
    return T(uint64_t(a) + uint64_t(b));
  else
    return a + b;
};
constexpr auto kSubtract = []<Number T>(T a, T b) {
  if constexpr (Integer<T>)
    return T(uint64_t(a) - uint64_t(b));
  else
    return a - b;
};
constexpr auto kMultiply = []<std::floating_point T>(T a, T b) { return a * b; };
constexpr auto kMultiplyLow = []<Integer T>(T a, T b) { return T(uint64_t(a) * uint64_t(b)); };
constexpr auto kMultiplyHigh = []<Integer T>(T a, T b)
  requires(sizeof(T) > 1)
{ return T(Twice<T>(a) * Twice<T>(b) >> 8 * sizeof(T)); };
constexpr auto kMultiplyWide = []<Integer T>(T a, T b)
  requires(sizeof(T) == 2 || sizeof(T) == 4)
{ return Twice<T>(a) * Twice<T>(b); };
constexpr auto kMultiplyAddLow = []<Integer T>(T a, T b, T c) {
  return T(uint64_t(a) * uint64_t(b) + uint64_t(c));
};
constexpr auto kFused = []<std::floating_point T>(T a, T b, T c) { return std::fma(a, b, c); };
// A division by zero has a result, whichever.
constexpr auto kDivide = []<Number T>(T a, T b) {
  if constexpr (!Integer<T>)
    return a / b;
  else if constexpr (std::is_signed_v<T>)
    return b == 0 ? T(-1) : b == T(-1) ? T(0 - uint64_t(a)) : T(a / b);
  else
    return b == 0 ? T(-1) : T(a / b);
};
constexpr auto kRemainder = []<Integer T>(T a, T b) {
  if constexpr (std::is_signed_v<T>)
    if (b == T(-1)) return T(0);
  return b == 0 ? a : T(a % b);
};
constexpr auto kLeast = []<Number T>(T a, T b) {
  if constexpr (Integer<T>)
    return std::min(a, b);
  else
    return std::fmin(a, b);
};
constexpr auto kMost = []<Number T>(T a, T b) {
  if constexpr (Integer<T>)
    return std::max(a, b);
  else
    return std::fmax(a, b);
};
constexpr auto kNegate = []<Number T>(T a) {
  if constexpr (Integer<T>)
    return T(0 - uint64_t(a));
  else
    return -a;
};
constexpr auto kAbsolute = []<Number T>(T a) {
  if constexpr (!Integer<T>)
    return std::fabs(a);
  else if constexpr (std::is_signed_v<T>)
    return a < 0 ? T(0 - uint64_t(a)) : a;
  else
    return a;
};
constexpr auto kAnd = []<Bits T>(T a, T b) { return T(a & b); };
constexpr auto kOr = []<Bits T>(T a, T b) { return T(a | b); };
constexpr auto kXor = []<Bits T>(T a, T b) { return T(a ^ b); };
constexpr auto kNot = []<Bits T>(T a) {
  if constexpr (std::same_as<T, bool>)
    return !a;
  else
    return T(~a);
};
constexpr auto kReverse = [](uint32_t a) {
  uint32_t made = 0;
  for (int bit = 0; bit < 32; ++bit) made |= (a >> bit & 1) << (31 - bit);
  return made;
};
constexpr auto kCount = []<Integer T>(T a)
  requires(sizeof(T) >= 4)
{ return uint32_t(std::popcount(std::make_unsigned_t<T>(a))); };
// How far the highest bit that is set would have to be shifted to the top.
constexpr auto kLeadingZeros = [](uint32_t a) { return a ? uint32_t(std::countl_zero(a)) : 0xFFFFFFFF; };
constexpr auto kMove = []<class T>(T a) { return a; };

template <class T>
Flow shift_left(Warp& w, const Instruction& i, uint32_t lanes) {
  uint64_t *to = w.slot(i, 0), *a = w.slot(i, 1), *by = w.slot(i, 2);
  for_each_lane(lanes, [&](int lane) {
    const uint32_t bits = get<uint32_t>(by[lane]);
    set(to[lane], bits < 8 * sizeof(T) ? T(get<T>(a[lane]) << bits) : T(0));
  });
  return Flow::next;
}

template <class T>
Flow shift_right(Warp& w, const Instruction& i, uint32_t lanes) {
  uint64_t *to = w.slot(i, 0), *a = w.slot(i, 1), *by = w.slot(i, 2);
  for_each_lane(lanes, [&](int lane) {
    const uint32_t most = 8 * sizeof(T) - 1, bits = get<uint32_t>(by[lane]);
    const T value = get<T>(a[lane]);
    set(to[lane], bits <= most ? T(value >> bits) : T(std::is_signed_v<T> ? value >> most : 0));
  });
  return Flow::next;
}

template <class T>
Flow extract(Warp& w, const Instruction& i, uint32_t lanes) {
  uint64_t *to = w.slot(i, 0), *a = w.slot(i, 1), *from = w.slot(i, 2), *count = w.slot(i, 3);
  for_each_lane(lanes, [&](int lane) {
    const uint32_t first = from[lane] & 0xFF, bits = std::min<uint32_t>(count[lane] & 0xFF, 32);
    const uint64_t all = std::is_signed_v<T> ? uint64_t(int64_t(get<T>(a[lane]))) : uint64_t(get<T>(a[lane]));
    const uint64_t field = bits ? all >> std::min(first, 63u) << (64 - bits) : 0;
    set(to[lane],
        bits == 0 ? T(0) : T(std::is_signed_v<T> ? int64_t(field) >> (64 - bits) : field >> (64 - bits)));
  });
  return Flow::next;
}

template <class T>
Flow multiply_add_wide(Warp& w, const Instruction& i, uint32_t lanes) {
  uint64_t *to = w.slot(i, 0), *a = w.slot(i, 1), *b = w.slot(i, 2), *c = w.slot(i, 3);
  for_each_lane(lanes, [&](int lane) {
    to[lane] = uint64_t(Twice<T>(get<T>(a[lane])) * Twice<T>(get<T>(b[lane]))) + c[lane];
  });
  return Flow::next;
}

template <class T>
Flow select(Warp& w, const Instruction& i, uint32_t lanes) {
  uint64_t *to = w.slot(i, 0), *a = w.slot(i, 1), *b = w.slot(i, 2), *which = w.slot(i, 3);
  for_each_lane(lanes, [&](int lane) { set(to[lane], get<T>(which[lane] & 1 ? a[lane] : b[lane])); });
  return Flow::next;
}

Flow logic(Warp& w, const Instruction& i, uint32_t lanes) {
  uint64_t *to = w.slot(i, 0), *a = w.slot(i, 1), *b = w.slot(i, 2), *c = w.slot(i, 3);
  const uint32_t table = uint32_t(*w.slot(i, 4));
  for_each_lane(lanes, [&](int lane) {
    uint32_t made = 0;
    for (int k = 0; k < 8; ++k)
      if (table >> k & 1)
        made |= (k & 4 ? a[lane] : ~a[lane]) & (k & 2 ? b[lane] : ~b[lane]) & (k & 1 ? c[lane] : ~c[lane]);
    to[lane] = made;
  });
  return Flow::next;
}

// Any four bytes of eight, or the sign of one.
Flow permute(Warp& w, const Instruction& i, uint32_t lanes) {
  uint64_t *to = w.slot(i, 0), *a = w.slot(i, 1), *b = w.slot(i, 2), *which = w.slot(i, 3);
  for_each_lane(lanes, [&](int lane) {
    const uint64_t bytes = (a[lane] & 0xFFFFFFFF) | b[lane] << 32;
    uint32_t made = 0;
    for (int k = 0; k < 4; ++k) {
      const uint32_t said = which[lane] >> 4 * k & 15, byte = bytes >> 8 * (said & 7) & 0xFF;
      made |= (said & 8 ? (byte & 0x80 ? 0xFF : 0) : byte) << 8 * k;
    }
    to[lane] = made;
  });
  return Flow::next;
}

// d, c = a; braces part or join.
Flow pack(Warp& w, const Instruction& i, uint32_t lanes) {
  const int outs = i.count(0), ins = i.count(1), bits = i.extra;
  for_each_lane(lanes, [&](int lane) {
    uint64_t all = 0;
    for (int k = 0; k < ins; ++k) {
      const uint64_t part = w.slot(i, 1, k)[lane];
      all |= ins == 1 ? part : (part & ((uint64_t{1} << bits / ins) - 1)) << bits / ins * k;
    }
    for (int k = 0; k < outs; ++k)
      w.slot(i, 0, k)[lane] = outs == 1 ? all : all >> bits / outs * k & ((uint64_t{1} << bits / outs) - 1);
  });
  return Flow::next;
}

template <class T, auto compare>
Flow test(Warp& w, const Instruction& i, uint32_t lanes) {
  uint64_t *to = w.slot(i, 0), *a = w.slot(i, 1), *b = w.slot(i, 2);
  for_each_lane(lanes, [&](int lane) { to[lane] = compare(get<T>(a[lane]), get<T>(b[lane])); });
  return Flow::next;
}

template <auto compare>
Handler test_of(const std::string& type) {
  return with_type(type, []<class T>() -> Handler { return test<T, compare>; });
}

template <class Compare>
struct Not {
  constexpr bool operator()(auto a, auto b) const { return !Compare{}(a, b); }
};

Handler setp_of(const std::vector<std::string>& parts) {
  if (parts.size() != 3) return nullptr;
  const std::string& how = parts[1];
  const bool real = parts[2][0] == 'f';
  if (how == "eq") return test_of<std::equal_to<>{}>(parts[2]);
  if (how == "ne" && !real) return test_of<std::not_equal_to<>{}>(parts[2]);
  if (how == "lt" || how == "lo") return test_of<std::less<>{}>(parts[2]);
  if (how == "le" || how == "ls") return test_of<std::less_equal<>{}>(parts[2]);
  if (how == "gt" || how == "hi") return test_of<std::greater<>{}>(parts[2]);
  if (how == "ge" || how == "hs") return test_of<std::greater_equal<>{}>(parts[2]);
  // The ones that NaN passes.
  if (how == "neu") return test_of<std::not_equal_to<>{}>(parts[2]);
  if (how == "ltu") return test_of<Not<std::greater_equal<>>{}>(parts[2]);
  if (how == "leu") return test_of<Not<std::greater<>>{}>(parts[2]);
  if (how == "gtu") return test_of<Not<std::less_equal<>>{}>(parts[2]);
  if (how == "geu") return test_of<Not<std::less<>>{}>(parts[2]);
  if (how == "num") return test_of<[](auto a, auto b) { return a == a && b == b; }>(parts[2]);
  if (how == "nan") return test_of<[](auto a, auto b) { return a != a || b != b; }>(parts[2]);
  return nullptr;
}

template <Half format, int count>
Flow half_fused(Warp& w, const Instruction& i, uint32_t lanes) {
  uint64_t *to = w.slot(i, 0), *a = w.slot(i, 1), *b = w.slot(i, 2), *c = w.slot(i, 3);
  for_each_lane(lanes, [&](int lane) {
    uint32_t made = 0;
    for (int k = 0; k < count; ++k) {
      const auto part = [&](const uint64_t* of) { return value_of<format>(uint32_t(of[lane] >> 16 * k)); };
      made |= uint32_t{half_of(fused(part(a), part(b), part(c)), format)} << 16 * k;
    }
    to[lane] = made;
  });
  return Flow::next;
}

template <Half format>
Flow from_half(Warp& w, const Instruction& i, uint32_t lanes) {
  uint64_t *to = w.slot(i, 0), *a = w.slot(i, 1);
  for_each_lane(lanes, [&](int lane) { set(to[lane], float(value_of<format>(uint32_t(a[lane])))); });
  return Flow::next;
}

template <Half format>
Flow to_half(Warp& w, const Instruction& i, uint32_t lanes) {
  uint64_t *to = w.slot(i, 0), *a = w.slot(i, 1);
  for_each_lane(lanes, [&](int lane) { set(to[lane], half_of(get<float>(a[lane]), format)); });
  return Flow::next;
}

// The first of the two becomes the upper half.
template <Half format>
Flow to_halves(Warp& w, const Instruction& i, uint32_t lanes) {
  uint64_t *to = w.slot(i, 0), *a = w.slot(i, 1), *b = w.slot(i, 2);
  for_each_lane(lanes, [&](int lane) {
    const uint32_t high = half_of(get<float>(a[lane]), format), low = half_of(get<float>(b[lane]), format);
    to[lane] = high << 16 | low;
  });
  return Flow::next;
}

// To the nearest, ties to even; what is out of range is the nearest that is not, a NaN 0.
Flow to_integer(Warp& w, const Instruction& i, uint32_t lanes) {
  uint64_t *to = w.slot(i, 0), *a = w.slot(i, 1);
  for_each_lane(lanes, [&](int lane) {
    const double value = get<float>(a[lane]);
    set(to[lane], int32_t(value == value ? std::nearbyint(std::clamp(value, -0x1p31, 0x1p31 - 1)) : 0));
  });
  return Flow::next;
}

template <class To, class From>
Flow convert(Warp& w, const Instruction& i, uint32_t lanes) {
  uint64_t *to = w.slot(i, 0), *a = w.slot(i, 1);
  for_each_lane(lanes, [&](int lane) { set(to[lane], To(get<From>(a[lane]))); });
  return Flow::next;
}

Handler cvt_of(const std::vector<std::string>& parts) {
  if (parts.size() < 3) return nullptr;
  const std::string &to = parts[parts.size() - 2], &from = parts.back();
  const std::string how = parts.size() == 4 ? parts[1] : "";
  if (parts.size() > 4) return nullptr;
  if (from == "f32" && how == "rn") {
    if (to == "f16") return to_half<Half::float16>;
    if (to == "bf16") return to_half<Half::bfloat16>;
    if (to == "f16x2") return to_halves<Half::float16>;
    if (to == "bf16x2") return to_halves<Half::bfloat16>;
  }
  if (from == "f32" && to == "s32" && how == "rni") return to_integer;
  if (to == "f32" && from == "f16") return from_half<Half::float16>;
  if (to == "f32" && from == "bf16") return from_half<Half::bfloat16>;
  const bool real = to[0] == 'f', of_real = from[0] == 'f';
  // An integer to a float is rounded to the nearest; none of the others are asked for.
  if (of_real || real != (how == "rn")) return nullptr;
  return with_type(to, [&]<class To>() {
    return with_type(from, []<class From>() -> Handler {
      if constexpr (Number<To> && Integer<From>)
        return convert<To, From>;
      else
        return nullptr;
    });
  });
}

template <class T>
Handler integers(Handler handler) {
  return Integer<T> ? handler : nullptr;
}

Flow nothing(Warp&, const Instruction&, uint32_t) { return Flow::next; }
Flow jump(Warp&, const Instruction&, uint32_t) { return Flow::jump; }
Flow leave(Warp&, const Instruction&, uint32_t) { return Flow::exit; }

Handler half_fused_of(const std::string& type) {
  if (type == "f16") return half_fused<Half::float16, 1>;
  if (type == "bf16") return half_fused<Half::bfloat16, 1>;
  if (type == "f16x2") return half_fused<Half::float16, 2>;
  if (type == "bf16x2") return half_fused<Half::bfloat16, 2>;
  return nullptr;
}

}  // namespace

Handler arithmetic_of(const std::vector<std::string>& parts, Instruction& instruction) {
  const std::string &name = parts[0], &type = parts.back();
  const bool rounded = parts.size() == 3 && parts[1] == "rn";  // to the nearest, as without a word
  const bool plain = parts.size() == 2 || (rounded && type[0] == 'f');
  const std::string how = parts.size() == 3 ? parts[1] : "";
  if (name == "bra") return jump;
  if (name == "ret" || name == "exit") return leave;
  if (name == "setmaxnreg") return nothing;
  if (name == "add" && plain) return map_of<kAdd, 1, 2>(type);
  if (name == "sub" && plain) return map_of<kSubtract, 1, 2>(type);
  if (name == "mul" && plain) return map_of<kMultiply, 1, 2>(type);
  if (name == "mul" && how == "lo") return map_of<kMultiplyLow, 1, 2>(type);
  if (name == "mul" && how == "hi") return map_of<kMultiplyHigh, 1, 2>(type);
  if (name == "mul" && how == "wide") return map_of<kMultiplyWide, 1, 2>(type);
  if (name == "mad" && how == "lo") return map_of<kMultiplyAddLow, 1, 2, 3>(type);
  if (name == "mad" && how == "wide" && type == "u32") return multiply_add_wide<uint32_t>;
  if (name == "mad" && how == "wide" && type == "s32") return multiply_add_wide<int32_t>;
  if (name == "fma" && how == "rn" && (type == "f32" || type == "f64")) return map_of<kFused, 1, 2, 3>(type);
  if (name == "fma" && how == "rn") return half_fused_of(type);
  if (name == "div" && plain) return map_of<kDivide, 1, 2>(type);
  if (name == "rem" && plain) return map_of<kRemainder, 1, 2>(type);
  if (name == "min" && plain) return map_of<kLeast, 1, 2>(type);
  if (name == "max" && plain) return map_of<kMost, 1, 2>(type);
  if (name == "neg" && plain) return map_of<kNegate, 1>(type);
  if (name == "abs" && plain) return map_of<kAbsolute, 1>(type);
  if (name == "and" && plain) return map_of<kAnd, 1, 2>(type);
  if (name == "or" && plain) return map_of<kOr, 1, 2>(type);
  if (name == "xor" && plain) return map_of<kXor, 1, 2>(type);
  if (name == "not" && plain) return map_of<kNot, 1>(type);
  if (name == "brev" && type == "b32") return map<uint32_t, kReverse, 1>;
  if (name == "popc") return map_of<kCount, 1>(type);
  if (name == "bfind" && how == "shiftamt" && type == "u32") return map<uint32_t, kLeadingZeros, 1>;
  if (name == "bfe" && type == "u32") return extract<uint32_t>;
  if (name == "bfe" && type == "s32") return extract<int32_t>;
  if (name == "lop3" && type == "b32") return logic;
  if (name == "prmt" && plain) return permute;
  if (name == "setp") return setp_of(parts);
  if (name == "cvt") return cvt_of(parts);
  // Global memory is at its own address.
  if (name == "cvta" && parts.size() == 4 && parts[2] == "global") return map<uint64_t, kMove, 1>;
  if (name == "mov" && (instruction.count(0) > 1 || instruction.count(1) > 1)) {
    instruction.extra = std::stoi(type.substr(1));
    return pack;
  }
  if (name == "mov" && plain) return map_of<kMove, 1>(type);
  if (name == "selp" && plain) return with_type(type, []<class T>() -> Handler { return select<T>; });
  const auto shifting = [&]<class T>() -> Handler {
    if constexpr (Integer<T>)
      return name == "shl" ? shift_left<T> : shift_right<T>;
    else
      return nullptr;
  };
  if ((name == "shl" || name == "shr") && plain) return with_type(type, shifting);
  return nullptr;
}

}  // namespace ptx
