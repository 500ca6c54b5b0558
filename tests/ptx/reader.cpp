// The text of a kernel to instructions: names to slots, labels to places.
#include <algorithm>
#include <cctype>
#include <cstring>

#include "program.h"

namespace ptx {
namespace {

bool is_space(char c) { return std::isspace(static_cast<unsigned char>(c)) != 0; }

std::string_view trimmed(std::string_view text) {
  while (!text.empty() && is_space(text.front())) text.remove_prefix(1);
  while (!text.empty() && is_space(text.back())) text.remove_suffix(1);
  return text;
}

std::vector<std::string> split(std::string_view text, char at) {
  std::vector<std::string> parts;
  int depth = 0;
  std::string part;
  for (const char c : text) {
    depth += c == '{' || c == '[';
    depth -= c == '}' || c == ']';
    if (c == at && depth == 0) {
      parts.emplace_back(trimmed(part));
      part.clear();
    } else {
      part += c;
    }
  }
  if (!trimmed(part).empty() || !parts.empty()) parts.emplace_back(trimmed(part));
  return parts;
}

int64_t bytes_of(const std::string& type) {
  if (type == ".pred") return 1;
  const size_t digit = type.find_first_of("0123456789");
  if (digit == std::string::npos) fail("a type: " + type);
  return std::stoll(type.substr(digit)) / 8;
}

int64_t aligned(int64_t bytes, int64_t to) { return (bytes + to - 1) / to * to; }

// `.align 8 .b8 name[16]` or `.u32 name`, whatever else is said between.
struct Declared {
  std::string name;
  int64_t align, bytes, element;
  bool open = false;  // [] of no size
};

Declared declared(std::string_view text) {
  Declared found{};
  std::string type, word;
  const std::string all = std::string(text) + " ";
  for (size_t i = 0; i < all.size(); ++i) {
    if (!is_space(all[i])) {
      word += all[i];
      continue;
    }
    if (word.empty()) continue;
    if (word == ".align") {
      if (type.empty()) found.align = std::stoll(all.substr(i));
      i = all.find_first_not_of(" \t\n", i);
      i = all.find_first_of(" \t\n", i);
    } else if (word == ".ptr") {  // what a pointer points to
    } else if (word[0] != '.') {
      found.name = word;
    } else if (type.empty() && word.find_first_of("0123456789") != std::string::npos) {
      type = word;
    }
    word.clear();
  }
  found.element = bytes_of(type);
  found.bytes = found.element;
  if (!found.align) found.align = found.element;
  if (const size_t open = found.name.find('['); open != std::string::npos) {
    const std::string size = found.name.substr(open + 1, found.name.find(']') - open - 1);
    found.open = size.empty();
    found.bytes *= found.open ? 0 : std::stoll(size);
    found.name.resize(open);
  }
  return found;
}

// Comments and lines about the source out of the way; strings, which only pragmas have, too.
std::string plain(const std::string& text) {
  std::string made;
  made.reserve(text.size());
  for (size_t i = 0; i < text.size();) {
    if (text.compare(i, 2, "//") == 0) {
      i = std::min(text.find('\n', i), text.size());
    } else if (text.compare(i, 2, "/*") == 0) {
      i = std::min(text.find("*/", i), text.size() - 2) + 2;
    } else if (text[i] == '.' && (text.compare(i, 5, ".loc\t") == 0 || text.compare(i, 6, ".file\t") == 0)) {
      i = std::min(text.find('\n', i), text.size());
    } else {
      made += text[i++];
    }
  }
  return made;
}

}  // namespace

Module::Module(std::string text) : text_(plain(text)) {
  for (size_t at = 0; (at = text_.find(".entry", at)) != std::string::npos;) {
    const size_t name = text_.find_first_not_of(" \t", at + 6), open = text_.find('(', at);
    entries_[std::string(trimmed(std::string_view(text_).substr(name, open - name)))] = open;
    at = open;
  }
  // Variables stand before the first kernel.
  const size_t end = std::min(text_.find(".entry"), text_.size());
  for (size_t at = 0; (at = std::min(text_.find(".global ", at), text_.find(".extern .shared", at))) < end;) {
    const bool global = text_.compare(at, 8, ".global ") == 0;
    const size_t stop = text_.find(';', at);
    const std::string_view said = std::string_view(text_).substr(at, stop - at);
    const size_t equals = said.find('=');
    const Declared found = declared(said.substr(0, equals));
    if (global) {
      std::vector<uint64_t> words(found.bytes / 8 + 2);
      auto* bytes = reinterpret_cast<unsigned char*>(words.data());
      if (equals != std::string_view::npos) {
        const size_t open = said.find('{', equals);
        const auto values = split(said.substr(open + 1, said.rfind('}') - open - 1), ',');
        for (size_t i = 0; i < values.size(); ++i) {
          const uint64_t value = std::stoull(values[i], nullptr, 0);
          std::memcpy(bytes + i * found.element, &value, found.element);
        }
      }
      globals_[found.name] = std::move(words);
    } else {
      externs_.insert(found.name);
    }
    at = stop;
  }
}

class Reader {
 public:
  Reader(const Module& module, const std::string& name, size_t at)
      : module_(module), text_(module.text_), at_(at), kernel_(new Kernel{}) {
    kernel_->name = name;
    for (const auto& [_, words] : module.globals_)
      kernel_->globals.push_back({reinterpret_cast<uint64_t>(words.data()), 8 * words.size()});
  }

  std::unique_ptr<Kernel> read() {
    read_parameters();
    at_ = text_.find('{', at_) + 1;
    scopes_.push_back({-1, {}, {}});
    for (int scope = 0; scope >= 0;) scope = read_statement(scope);
    for (const auto& [instruction, scope, label] : branches_)
      kernel_->code[instruction].target = place_of(scope, label);
    for (Declared& one : open_) symbols_[one.name] = kSharedAddress + aligned(kernel_->shared_bytes, 128);
    for (const auto& [slot, name] : addresses_) {
      const auto found = symbols_.find(name);
      if (found == symbols_.end()) fail("no such name: " + name);
      kernel_->constants.push_back({slot, uint64_t(found->second)});
    }
    if (!open_.empty()) kernel_->shared_bytes = aligned(kernel_->shared_bytes, 128);
    return std::move(kernel_);
  }

 private:
  struct Scope {
    int outer;
    std::map<std::string, int> registers, labels;
  };
  struct Branch {
    size_t instruction;
    int scope;
    std::string label;
  };

  const Module& module_;
  const std::string& text_;
  size_t at_;
  std::unique_ptr<Kernel> kernel_;
  std::vector<Scope> scopes_;
  std::vector<Branch> branches_;
  std::vector<Declared> open_;
  std::map<std::string, int64_t> symbols_;
  std::vector<std::pair<int, std::string>> addresses_;
  std::map<uint64_t, int> constants_;
  std::map<std::string, int> named_;

  void read_parameters() {
    const size_t close = text_.find(')', at_);
    int64_t offset = 0;
    for (const std::string& one : split(std::string_view(text_).substr(at_ + 1, close - at_ - 1), ',')) {
      if (one.empty()) continue;
      const Declared found = declared(one);
      offset = aligned(offset, found.align);
      kernel_->parameters.push_back({offset, found.bytes});
      symbols_[found.name] = offset;
      offset += found.bytes;
    }
    kernel_->parameter_bytes = offset;
    at_ = close;
  }

  // Returns the scope that the next one belongs to.
  int read_statement(int scope) {
    while (is_space(text_[at_])) ++at_;
    if (text_[at_] == '}') return ++at_, scopes_[scope].outer;
    if (text_[at_] == '{') {
      ++at_;
      scopes_.push_back({scope, {}, {}});
      return int(scopes_.size()) - 1;
    }
    const size_t stop = text_.find_first_of(";:", at_);
    // A colon ends a label; within an instruction's name two follow each other.
    if (text_[stop] == ':' && text_[stop + 1] != ':') {
      scopes_[scope].labels[std::string(trimmed(std::string_view(text_).substr(at_, stop - at_)))] =
          int(kernel_->code.size());
      at_ = stop + 1;
      return scope;
    }
    const size_t end = text_.find(';', at_);
    const std::string_view statement = trimmed(std::string_view(text_).substr(at_, end - at_));
    at_ = end + 1;
    if (statement.empty() || statement.substr(0, 7) == ".pragma") return scope;
    if (statement.substr(0, 4) == ".reg") {
      declare_registers(scope, statement.substr(4));
    } else if (statement.substr(0, 7) == ".shared") {
      const Declared found = declared(statement);
      kernel_->shared_bytes = aligned(kernel_->shared_bytes, found.align);
      symbols_[found.name] = kSharedAddress + kernel_->shared_bytes;
      kernel_->shared_bytes += found.bytes;
    } else {
      read_instruction(scope, std::string(statement));
    }
    return scope;
  }

  void declare_registers(int scope, std::string_view text) {
    text = trimmed(text);
    const size_t space = text.find_first_of(" \t");
    for (const std::string& name : split(text.substr(space), ',')) {
      const size_t open = name.find('<');
      if (open == std::string::npos) {
        scopes_[scope].registers[name] = kernel_->slots++;
      } else {
        const int count = std::stoi(name.substr(open + 1));
        for (int i = 0; i < count; ++i)
          scopes_[scope].registers[name.substr(0, open) + std::to_string(i)] = kernel_->slots++;
      }
    }
  }

  int register_of(int scope, const std::string& name) const {
    for (; scope >= 0; scope = scopes_[scope].outer)
      if (const auto found = scopes_[scope].registers.find(name); found != scopes_[scope].registers.end())
        return found->second;
    return -1;
  }

  int place_of(int scope, const std::string& label) const {
    for (; scope >= 0; scope = scopes_[scope].outer)
      if (const auto found = scopes_[scope].labels.find(label); found != scopes_[scope].labels.end())
        return found->second;
    fail("no such label: " + label);
  }

  int constant(uint64_t value) {
    const auto [found, added] = constants_.try_emplace(value, kernel_->slots);
    if (added) kernel_->constants.push_back({kernel_->slots++, value});
    return found->second;
  }

  int slot_of(int scope, const std::string& word) {
    if (const int slot = register_of(scope, word); slot >= 0) return slot;
    const char first = word[0];
    if (std::isdigit(static_cast<unsigned char>(first)) || first == '-') {
      if (word.compare(0, 2, "0f") == 0 || word.compare(0, 2, "0F") == 0)
        return constant(std::stoul(word.substr(2), nullptr, 16));
      return constant(first == '-' ? uint64_t(std::stoll(word, nullptr, 0)) : std::stoull(word, nullptr, 0));
    }
    const auto [found, added] = named_.try_emplace(word, kernel_->slots);
    if (!added) return found->second;
    const int slot = kernel_->slots++;
    if (first == '%') {
      kernel_->specials.push_back({slot, word});
    } else if (const auto global = module_.globals_.find(word); global != module_.globals_.end()) {
      kernel_->constants.push_back({slot, reinterpret_cast<uint64_t>(global->second.data())});
    } else {
      if (module_.externs_.count(word) && symbols_.try_emplace(word, 0).second)
        open_.push_back({word, 0, 0, 0});
      addresses_.push_back({slot, word});
    }
    return slot;
  }

  void add_operand(int scope, Instruction& to, std::string_view text) {
    Operand operand{int(to.slots.size()), 0, 0};
    const char first = text[0];
    if (first == '{' || first == '[') text = trimmed(text.substr(1, text.size() - 2));
    for (const std::string& part : split(text, first == '{' ? ',' : '|')) {
      std::string word = part;
      if (first == '[') {
        const size_t plus = part.find('+');
        word = std::string(trimmed(std::string_view(part).substr(0, plus)));
        if (plus != std::string::npos) operand.offset = std::stoll(part.substr(plus + 1), nullptr, 0);
      }
      to.slots.push_back(word == "_" ? kernel_->slots++ : slot_of(scope, word));
      ++operand.count;
    }
    to.operands.push_back(operand);
  }

  void read_instruction(int scope, const std::string& text) {
    Instruction made;
    made.text = text;
    std::string_view rest = made.text;
    if (rest[0] == '@') {
      const size_t space = rest.find_first_of(" \t");
      made.negated = rest[1] == '!';
      made.predicate = slot_of(scope, std::string(rest.substr(1 + made.negated, space - 1 - made.negated)));
      rest = trimmed(rest.substr(space));
    }
    const size_t space = std::min(rest.find_first_of(" \t\n"), rest.size());
    const std::vector<std::string> parts = split(rest.substr(0, space), '.');
    const std::string_view operands = trimmed(rest.substr(space));
    if (parts[0] == "bra")
      branches_.push_back({kernel_->code.size(), scope, std::string(operands)});
    else
      for (const std::string& one : split(operands, ',')) add_operand(scope, made, one);
    made.run = handler_of(parts, made);
    if (!made.run) fail("not known: " + text);
    kernel_->code.push_back(std::move(made));
  }
};

const Kernel& Module::kernel(const std::string& name) {
  std::unique_ptr<Kernel>& kept = kernels_[name];
  if (!kept) {
    const auto found = entries_.find(name);
    if (found == entries_.end()) fail("no such kernel: " + name);
    kept = Reader(*this, name, found->second).read();
  }
  return *kept;
}

}  // namespace ptx
