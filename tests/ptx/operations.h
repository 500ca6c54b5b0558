// What handlers of instructions are made of: registers as values of a type, and a function for all lanes.
#pragma once

#include <concepts>
#include <type_traits>

#include "machine.h"

namespace ptx {

template <class T>
T get(const uint64_t& slot) {
  if constexpr (std::is_same_v<T, bool>) {
    return slot & 1;
  } else {
    T value;
    std::memcpy(&value, &slot, sizeof value);
    return value;
  }
}

// The bits above those of the type are zero.
template <class T>
void set(uint64_t& slot, T value) {
  slot = 0;
  std::memcpy(&slot, &value, sizeof value);
}

// make.template operator()<T>() for the type that a name says.
template <class Make>
Handler with_type(const std::string& name, const Make& make) {
  if (name == "u8" || name == "b8") return make.template operator()<uint8_t>();
  if (name == "s8") return make.template operator()<int8_t>();
  if (name == "u16" || name == "b16") return make.template operator()<uint16_t>();
  if (name == "s16") return make.template operator()<int16_t>();
  if (name == "u32" || name == "b32") return make.template operator()<uint32_t>();
  if (name == "s32") return make.template operator()<int32_t>();
  if (name == "u64" || name == "b64") return make.template operator()<uint64_t>();
  if (name == "s64") return make.template operator()<int64_t>();
  if (name == "f32") return make.template operator()<float>();
  if (name == "f64") return make.template operator()<double>();
  if (name == "pred") return make.template operator()<bool>();
  return nullptr;
}

// Operand 0 becomes a function of others, by number.
template <class T, auto function, int... operand>
Flow map(Warp& w, const Instruction& i, uint32_t lanes) {
  uint64_t* to = w.slot(i, 0);
  const uint64_t* from[] = {to, w.slot(i, operand)...};
  for_each_lane(lanes, [&](int lane) { set(to[lane], function(get<T>(from[operand][lane])...)); });
  return Flow::next;
}

// For each type that the function takes.
template <auto function, int... operand>
Handler map_of(const std::string& type) {
  return with_type(type, []<class T>() -> Handler {
    if constexpr (requires(T a) { function((void(operand), a)...); })
      return map<T, function, operand...>;
    else
      return nullptr;
  });
}

Handler arithmetic_of(const std::vector<std::string>& parts, Instruction& instruction);
Handler memory_of(const std::vector<std::string>& parts, Instruction& instruction);
Handler warp_of(const std::vector<std::string>& parts, Instruction& instruction);
Handler tensor_of(const std::vector<std::string>& parts, Instruction& instruction);

}  // namespace ptx
