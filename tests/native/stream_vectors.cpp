// Reads tests/vectors.txt and holds csrc/stream.h to every line of it. Prints the number of lines.
#include <algorithm>
#include <cinttypes>
#include <cstdio>
#include <fstream>
#include <iostream>
#include <sstream>
#include <string>
#include <vector>

#include "../../csrc/stream.h"

namespace {

nmkern::Key key_of(uint64_t seed) { return {uint32_t(seed), uint32_t(seed >> 32)}; }

bool check(const std::string& line) {
  std::istringstream in(line);
  std::string kind;
  in >> kind;
  if (kind == "philox") {
    uint32_t v[10];
    for (uint32_t& word : v) in >> std::hex >> word;
    const nmkern::Words words = nmkern::philox4x32(v[0], v[1], v[2], v[3], {v[4], v[5]});
    return in && std::equal(words.w, words.w + 4, v + 6);
  }
  uint64_t seed, row;
  if (kind == "dense") {
    std::string name;
    uint64_t col;
    uint32_t word;
    int code;
    in >> name >> seed >> row >> col >> std::hex >> word >> std::dec >> code;
    const auto family = name == "rademacher" ? nmkern::Family::rademacher
                        : name == "uniform"  ? nmkern::Family::uniform
                                             : nmkern::Family::normal;
    const uint64_t columns = uint64_t(nmkern::columns_per_word(family));
    const uint32_t bits = uint32_t(32 / columns);
    const uint32_t got = nmkern::philox4x32(uint32_t(col / columns), uint32_t(row / 4), 0,
                                            uint32_t(family), key_of(seed))
                             .w[row % 4];
    const uint32_t field = (got >> (col % columns * bits)) & ((1u << bits) - 1);
    return in && got == word && nmkern::decode(family, field) == code;
  }
  if (kind != "sparse") return false;
  uint64_t n, k;
  in >> seed >> row >> n >> k;
  std::vector<uint64_t> chosen;
  nmkern::Words words{};
  for (uint64_t s = 0; s < k; ++s) {
    if (s % 4 == 0)
      words = nmkern::philox4x32(uint32_t(s / 4), uint32_t(row), 0, nmkern::kSparseTag, key_of(seed));
    const uint32_t j = uint32_t(n - k + s);
    uint64_t t = nmkern::sparse_draw(words.w[s % 4], j);
    if (std::count(chosen.begin(), chosen.end(), t)) t = j;
    chosen.push_back(t);
    uint64_t want;
    in >> want;
    if (!in || want != t) return false;
  }
  return true;
}

}  // namespace

int main(int, char** argv) {
  std::ifstream file(argv[1]);
  std::string line;
  int lines = 0;
  while (std::getline(file, line)) {
    if (line.empty() || line[0] == '#') continue;
    if (!check(line)) {
      std::cout << "differs: " << line << "\n";
      return 1;
    }
    ++lines;
  }
  std::cout << lines << "\n";
}
