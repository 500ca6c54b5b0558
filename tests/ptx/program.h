// PTX, the assembly that nvcc and Triton compile to, from text to what machine.h executes.
//
// Every operand of an instruction is a slot: 64 bits for each lane of a warp. Registers are slots, and so are
// constants and special registers, which are filled before a warp starts. An operand in braces is several.
//
// Invariant: what is not known is refused when a kernel is read, with the line that has it, never guessed.
#pragma once

#include <cstdint>
#include <map>
#include <memory>
#include <set>
#include <stdexcept>
#include <string>
#include <string_view>
#include <vector>

namespace ptx {

constexpr int kLanes = 32;

[[noreturn]] inline void fail(const std::string& what) { throw std::runtime_error(what); }

struct Warp;
struct Instruction;

// What an instruction has done to the lanes that executed it: they go on; go to its target; are not together
// with the lanes that it needs; try it again when others have run; wait at a barrier, or have ended.
enum class Flow { next, jump, apart, again, wait, exit };
using Handler = Flow (*)(Warp&, const Instruction&, uint32_t lanes);

struct Operand {
  int first = 0, count = 0;  // slots[first ..]
  int64_t offset = 0;        // of an address
};

struct Instruction {
  Handler run = nullptr;
  std::vector<int> slots;
  std::vector<Operand> operands;
  int predicate = -1;
  bool negated = false;
  int target = -1;
  int extra = 0;  // a handler's own
  std::string text;

  int slot(int operand, int which = 0) const { return slots[operands[operand].first + which]; }
  int count(int operand) const { return operands[operand].count; }
};

struct Special {
  int slot;
  std::string name;
};

struct Parameter {
  int64_t offset, bytes;
};

struct Kernel {
  std::string name;
  std::vector<Instruction> code;
  std::vector<std::pair<int, uint64_t>> constants;  // slot, value
  std::vector<Special> specials;
  std::vector<Parameter> parameters;
  std::vector<std::pair<uint64_t, uint64_t>> globals;  // variables: address, bytes
  int slots = 0;
  int64_t parameter_bytes = 0, shared_bytes = 0;  // shared memory beside what a launch adds
};

// Finds what executes an instruction, by the parts of its name between dots; nullptr where nothing does.
Handler handler_of(const std::vector<std::string>& parts, Instruction& instruction);

constexpr uint32_t kSharedAddress = 1024;  // of the first byte: the device has some of its own before it

// A translation unit: its variables, and its kernels, which are read when they are asked for.
class Module {
 public:
  explicit Module(std::string text);
  const Kernel& kernel(const std::string& name);
  bool has(const std::string& name) const { return entries_.count(name) != 0; }

 private:
  std::string text_;
  std::map<std::string, size_t> entries_;  // where each begins
  std::map<std::string, std::vector<uint64_t>> globals_;
  std::set<std::string> externs_;  // names for what a launch adds to shared memory
  std::map<std::string, std::unique_ptr<Kernel>> kernels_;
  friend class Reader;
};

}  // namespace ptx
