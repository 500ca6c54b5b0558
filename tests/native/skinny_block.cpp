// Runs the CUDA kernels' own code on a host, block by block, and holds it to the stream: no GPU is needed.
//
// Every lane is a fiber; a fiber that must wait for others (__syncthreads, mma.sync) yields. mma.sync
// places the registers of the 32 lanes in A, B and C by the layout that the PTX manual documents, and
// multiplies. Shared memory and partial sums start as NaN. Inputs are integers, so that sums are exact and
// outputs are compared bit for bit. Prints the number of cases.
#include <ucontext.h>

#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <limits>
#include <memory>
#include <random>
#include <set>
#include <string>
#include <vector>

#include "../../csrc/cuda/skinny_plan.h"

namespace {

using namespace nmkern;
using namespace nmkern::cuda;

[[noreturn]] void fail(const std::string& what) {
  std::printf("%s\n", what.c_str());
  std::exit(1);
}

// The PTX manual's "Matrix Fragments for mma.m16n8k16 with floating point type", element by element.
void check_layout() {
  for (int lane = 0; lane < 32; ++lane) {
    const int group = lane >> 2, in_group = lane % 4;
    for (int i = 0; i < 8; ++i) {
      const int row = (i < 2 || (i >= 4 && i < 6)) ? group : group + 8;
      const int col = in_group * 2 + (i & 1) + (i >= 4 ? 8 : 0);
      if (a_row(lane, i / 2) != row || a_col(lane, i / 2, i & 1) != col) fail("layout of A");
    }
    for (int i = 0; i < 4; ++i) {
      if (b_row(lane, i / 2, i & 1) != in_group * 2 + (i & 1) + (i >= 2 ? 8 : 0)) fail("layout of B");
      if (b_col(lane) != group) fail("layout of B");
      if (c_row(lane, i) != (i < 2 ? group : group + 8)) fail("layout of C");
      if (c_col(lane, i) != in_group * 2 + (i & 1)) fail("layout of C");
    }
  }
}

struct Barrier {
  int size, arrived = 0, round = 0;
};

struct WarpState {
  Barrier barrier{kLanes};
  uint32_t a[kLanes][4], b[kLanes][2];
  double product[16][8];

  void multiply() {
    double left[16][16], right[16][8];
    for (int lane = 0; lane < kLanes; ++lane)
      for (int e = 0; e < 2; ++e) {
        const auto value = [e](uint32_t reg) { return float_of(e ? reg & 0xFFFF0000 : reg << 16); };
        for (int reg = 0; reg < 4; ++reg) left[a_row(lane, reg)][a_col(lane, reg, e)] = value(a[lane][reg]);
        for (int reg = 0; reg < 2; ++reg) right[b_row(lane, reg, e)][b_col(lane)] = value(b[lane][reg]);
      }
    for (int i = 0; i < 16; ++i)
      for (int j = 0; j < 8; ++j) {
        product[i][j] = 0;
        for (int k = 0; k < 16; ++k) product[i][j] += left[i][k] * right[k][j];
      }
  }
};

constexpr NormalTable kTable = normal_table();

struct Block {
  uint32_t x, y, z;
  ucontext_t scheduler;
  Barrier barrier{kThreads};
  WarpState warps[kWarps];
  bool progress = false;
};

struct HostLane {
  Block& block;
  int thread_;
  ucontext_t context{};
  std::unique_ptr<char[]> stack;
  bool done = false;

  int thread() const { return thread_; }
  int lane() const { return thread_ % kLanes; }
  uint32_t block_x() const { return block.x; }
  uint32_t block_y() const { return block.y; }
  uint32_t block_z() const { return block.z; }
  const NormalTable& table() const { return kTable; }

  template <class Last>
  void meet(Barrier& barrier, const Last& last) {
    const int round = barrier.round;
    block.progress = true;
    if (++barrier.arrived == barrier.size) {
      last();
      barrier.arrived = 0;
      ++barrier.round;
    }
    while (barrier.round == round) swapcontext(&context, &block.scheduler);
  }

  void wait() {
    meet(block.barrier, [] {});
  }

  template <class C, int count>
  void load(const unsigned char* x, int first, uint32_t (&b)[count][2]) const {
    for (int i = 0; i < count; ++i) std::memcpy(b[i], x + C::x_offset(0, first + i), 8);
    // Where the device loads 16 bytes, the second pair must lie behind the first.
    if constexpr (C::kVector == 2 && count % 2 == 0)
      for (int i = 0; i < count; i += 2)
        if (C::x_offset(0, first + i + 1) != C::x_offset(0, first + i) + 8 ||
            reinterpret_cast<uintptr_t>(x + C::x_offset(0, first + i)) % 16)
          fail("a pair of pairs is no 16 bytes");
  }

  template <int pieces>
  void load_elements(const uint16_t* x, uint32_t (&element)[pieces][2]) const {
    if (reinterpret_cast<uintptr_t>(x) % (pieces % 2 ? 8 : 16)) fail("x is not aligned");
    std::memcpy(element, x, sizeof element);
  }

  void multiply(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
    WarpState& warp = block.warps[thread_ / kLanes];
    std::memcpy(warp.a[lane()], a, sizeof a);
    std::memcpy(warp.b[lane()], b, sizeof b);
    meet(warp.barrier, [&] { warp.multiply(); });
    for (int reg = 0; reg < 4; ++reg)
      c[reg] = float(double{c[reg]} + warp.product[c_row(lane(), reg)][c_col(lane(), reg)]);
  }

  void store(float* to, float a, float b, float c, float d) const {
    if (reinterpret_cast<uintptr_t>(to) % 16) fail("a store is not aligned");
    const float values[] = {a, b, c, d};
    std::memcpy(to, values, sizeof values);
  }

  static float rounded_sum(float a, float b) { return a + b; }
  static float rounded_product(float a, float b) { return a * b; }
};

template <class C>
struct Task {
  const Product* product;
  HostLane* lane;
  unsigned char* shared;

  static void enter(unsigned high, unsigned low) {
    const auto& task = *reinterpret_cast<Task*>(uintptr_t{high} << 32 | low);
    skinny_block<C>(*task.product, *task.lane, task.shared);
    task.lane->done = task.lane->block.progress = true;
    swapcontext(&task.lane->context, &task.lane->block.scheduler);
  }
};

template <class C>
void run_block(const Product& product, uint32_t x, uint32_t y, uint32_t z) {
  constexpr size_t kStack = 256 << 10;
  auto block = std::make_unique<Block>();
  block->x = x, block->y = y, block->z = z;
  std::vector<float> shared(C::kSharedBytes / 4 + 32, std::numeric_limits<float>::quiet_NaN());
  auto* aligned = reinterpret_cast<unsigned char*>((reinterpret_cast<uintptr_t>(shared.data()) + 127) & ~127ul);
  std::vector<std::unique_ptr<HostLane>> lanes;
  std::vector<Task<C>> tasks(kThreads);
  for (int thread = 0; thread < kThreads; ++thread) {
    lanes.emplace_back(new HostLane{*block, thread});
    HostLane& lane = *lanes.back();
    tasks[thread] = {&product, &lane, aligned};
    lane.stack.reset(new char[kStack]);
    getcontext(&lane.context);
    lane.context.uc_stack.ss_sp = lane.stack.get();
    lane.context.uc_stack.ss_size = kStack;
    lane.context.uc_link = nullptr;
    const auto at = reinterpret_cast<uintptr_t>(&tasks[thread]);
    makecontext(&lane.context, reinterpret_cast<void (*)()>(&Task<C>::enter), 2, unsigned(at >> 32),
                unsigned(at));
  }
  for (bool left = true; left;) {
    left = block->progress = false;
    for (auto& lane : lanes)
      if (!lane->done) {
        swapcontext(&block->scheduler, &lane->context);
        left = true;
      }
    if (left && !block->progress) fail("lanes wait for each other");
  }
}

struct Simulate {
  const Skinny& call;
  std::set<std::string>& kernels;
  int64_t* splits;

  template <class C>
  void operator()() const {
    using Patch = typename C::Patch;
    char name[64];
    std::snprintf(name, sizeof name, "%x %d %d %d", unsigned(Patch::kFamily), Patch::kTransposed,
                  C::kBatchTiles, C::kParts);
    kernels.insert(name);
    Plan plan = plan_of<C>(call);
    *splits = plan.splits;
    std::vector<float> scratch(plan.scratch_bytes() / 4 + 4, std::numeric_limits<float>::quiet_NaN());
    auto* partial = reinterpret_cast<float*>((reinterpret_cast<uintptr_t>(scratch.data()) + 15) & ~15ul);
    plan.product.partial = partial;
    plan.finish.partial = partial;
    for (uint32_t z = 0; z < plan.blocks_z; ++z)
      for (uint32_t y = 0; y < plan.splits; ++y)
        for (uint32_t x = 0; x < plan.blocks_x; ++x) run_block<C>(plan.product, x, y, z);
    for (int64_t m = 0; m < call.batch; ++m)
      for (int64_t n = 0; n < call.outputs(); ++n) finish_one<HostLane>(plan.finish, m, n);
  }
};

int code_at(const Skinny& call, int64_t row, int64_t col) {
  row += call.row_offset, col += call.col_offset;
  const int columns = columns_per_word(call.family), bits = 32 / columns;
  const uint32_t word =
      philox4x32(uint32_t(col / columns), uint32_t(row / 4), 0, uint32_t(call.family), call.key).w[row % 4];
  return decode(call.family, word >> (col % columns * bits) & ((1u << bits) - 1));
}

struct Case {
  Family family;
  bool transposed;
  int64_t row_offset, col_offset, inputs, outputs, batch;
  Dtype dtype = Dtype::bfloat16;
  bool modulated = false;  // gains, bias and contexts
  int64_t padding = 0;     // elements between rows of x
  int64_t stride = 1;      // between columns
};

// The exact product by the definition; every step of it is an integer below 2^24.
void check(const Case& c, std::mt19937_64& random, std::set<std::string>& kernels, int64_t* splits) {
  Skinny call{};
  call.family = c.family;
  call.key = {uint32_t(random()), uint32_t(random())};
  call.transposed = c.transposed;
  call.row_offset = c.row_offset, call.col_offset = c.col_offset;
  call.rows = c.transposed ? c.inputs : c.outputs, call.cols = c.transposed ? c.outputs : c.inputs;
  call.factor = 0.5f;
  call.batch = c.batch;
  const auto integer = [&](int64_t most) { return double(int64_t(random() % uint64_t(2 * most + 1)) - most); };

  const int64_t row_stride = c.inputs * c.stride + c.padding;
  const int64_t elements = c.batch * row_stride;
  // Elements of float32 that need all three parts are few in a row, so that sums stay exact.
  std::vector<double> x(elements);
  const bool wide = c.dtype == Dtype::float32 && !c.modulated;
  for (int64_t m = 0; m < c.batch; ++m)
    for (int64_t k = 0; k < c.inputs; ++k)
      x[m * row_stride + k * c.stride] = !wide ? integer(4) : random() % uint64_t(c.inputs) < 3 ? integer(21000) : 0;
  std::vector<uint32_t> storage(elements + 4);
  auto* data = reinterpret_cast<void*>((reinterpret_cast<uintptr_t>(storage.data()) + 15) & ~15ul);
  call.x = {data, c.dtype, row_stride, c.stride};
  for (int64_t m = 0; m < c.batch; ++m)
    for (int64_t k = 0; k < c.inputs; ++k) write_element(call.x, m, k, float(x[m * row_stride + k * c.stride]));

  const int64_t contexts = 3;
  std::vector<float> in_gain(contexts * c.inputs), out_gain(c.batch * c.outputs), bias(c.outputs);
  std::vector<int64_t> context(c.batch);
  for (float& v : in_gain) v = float(integer(300));
  for (float& v : out_gain) v = float(integer(2));
  for (float& v : bias) v = float(integer(100));
  for (int64_t& v : context) v = int64_t(random() % contexts);
  const bool banks = c.batch % 2 != 0;  // in_gain by context, or a row of out_gain for every row of x
  if (c.modulated) {
    call.in_gain = {banks ? in_gain.data() : nullptr, contexts};
    call.context = banks ? context.data() : nullptr;
    call.out_gain = {out_gain.data(), banks ? 1 : c.batch};
    call.bias = {bias.data(), 1};
  }
  std::vector<float> y(c.batch * c.outputs, std::numeric_limits<float>::quiet_NaN());
  call.y = {y.data(), Dtype::float32, c.outputs, 1};
  with_config(call, Simulate{call, kernels, splits});

  std::vector<double> row(c.inputs);
  for (int64_t n = 0; n < c.outputs; ++n) {
    for (int64_t k = 0; k < c.inputs; ++k)
      row[k] = c.transposed ? code_at(call, k, n) : code_at(call, n, k);
    for (int64_t m = 0; m < c.batch; ++m) {
      double sum = 0;
      for (int64_t k = 0; k < c.inputs; ++k)
        sum += x[m * row_stride + k * c.stride] * row[k] *
               (call.in_gain.data ? in_gain[context[m] * c.inputs + k] : 1.0f);
      if (std::abs(sum) > 0x1p24) fail("the case itself is not exact");
      double want = sum * 0.5;
      if (c.modulated) want = want * out_gain[banks ? n : m * c.outputs + n] + bias[n];
      if (y[m * c.outputs + n] != want) {
        char text[256];
        std::snprintf(text, sizeof text,
                      "family %x transposed %d offset %lld %lld K %lld N %lld M %lld dtype %d modulated %d: "
                      "y[%lld, %lld] is %g, expected %g",
                      unsigned(c.family), c.transposed, (long long)c.row_offset, (long long)c.col_offset,
                      (long long)c.inputs, (long long)c.outputs, (long long)c.batch, int(c.dtype),
                      c.modulated, (long long)m, (long long)n, y[m * c.outputs + n], want);
        fail(text);
      }
    }
  }
}

void check_hash(std::mt19937_64& random) {
  for (int i = 0; i < 10000; ++i) {
    const uint32_t c0 = uint32_t(random()), c1 = uint32_t(random());
    const Key key{uint32_t(random()), uint32_t(random())};
    const RoundKeys keys = round_keys(key, Family::normal);
    const Words got = patch(row_part(c1, keys), column_part(c0, keys), keys);
    const Words want = philox4x32(c0, c1, 0, uint32_t(Family::normal), key);
    if (std::memcmp(&got, &want, sizeof got)) fail("patch is not Philox");
  }
}

}  // namespace

int main() {
  std::mt19937_64 random(1);
  check_layout();
  check_hash(random);
  int64_t cases = 0, most_splits = 0;
  std::set<std::string> kernels;
  const auto run = [&](const Case& c) {
    int64_t splits = 0;
    check(c, random, kernels, &splits);
    most_splits = std::max(most_splits, splits);
    ++cases;
  };
  constexpr int64_t kFar = (int64_t{1} << 34) - 700;
  for (Family family : {Family::rademacher, Family::uniform, Family::normal})
    for (bool transposed : {false, true}) {
      for (int64_t batch : {1, 9, 24, 64}) run({family, transposed, 0, 0, 64, 40, batch});
      run({family, transposed, 5, 43, 77, 33, 7});                    // ragged everywhere
      run({family, transposed, 3, 0, 1, 1, 2});                       // one weight
      run({family, transposed, kFar, kFar + 5, 130, 31, 13});         // the stream's far end
      run({family, transposed, 2, 1, 32, 9, 70});                     // more rows than a block takes
      run({family, transposed, 0, 0, 1024, 8, 3});                    // several splits
      run({family, transposed, 4, 32, 96, 24, 5, Dtype::bfloat16, false, 32});  // aligned, x with padding
      run({family, transposed, 1, 2, 45, 12, 5, Dtype::bfloat16, false, 3, 2});
      run({family, transposed, 6, 7, 50, 21, 12, Dtype::float32});
      run({family, transposed, 6, 7, 90, 21, 4, Dtype::float16});
      run({family, transposed, 9, 35, 24, 17, 8, Dtype::bfloat16, true});   // no in_gain: a row for each row
      run({family, transposed, 9, 35, 24, 17, 9, Dtype::bfloat16, true});   // in_gain by context
      run({family, transposed, 9, 35, 24, 17, 35, Dtype::float32, true});
    }
  if (most_splits < 3) fail("no case splits the reduction");
  if (kernels.size() != 42) fail("not every kernel ran: " + std::to_string(kernels.size()));
  std::printf("%lld cases, %zu kernels\n", (long long)cases, kernels.size());
}
