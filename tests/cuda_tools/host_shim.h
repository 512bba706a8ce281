// Stands in for kernels/device.cuh so that g++ compiles the kernels' own text and a CPU runs it, with checks that no
// GPU makes. Every thread of a block is a fiber on one thread of the CPU; it runs until it waits for others (barrier,
// warp collective). Which fiber runs next is the schedule: 0 the one that became ready last, 1 first, any other number
// a pseudo-random one with that seed.
//
// Checked: shared memory bounds, reads of what nobody wrote, reads and writes by different threads without a barrier
// between them, reads of cp.async copies not waited for, sources of copies, divergence at collectives and barriers,
// metadata of mma.sp, alignment. Counted: bank conflicts of ldmatrix. Not seen: what stands inside asm strings.
#include <algorithm>
#include <cmath>
#include <cstdarg>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <string>
#include <type_traits>
#include <utility>
#include <vector>
#include <sys/mman.h>
#if !defined(__x86_64__)
#include <ucontext.h>
#endif

typedef unsigned char u8;
typedef unsigned short u16;
typedef unsigned int u32;
typedef unsigned long long u64;

struct alignas(16) Chunk {
    u32 word[4];
};

namespace shim {

constexpr u32 WARP = 32;
constexpr size_t STACK_BYTES = 64 * 1024;
constexpr u32 MAX_DYNAMIC = 228 * 1024, STATIC_BEGIN = 256 * 1024, SHARED_END = STATIC_BEGIN + 48 * 1024;
constexpr u8 POISON = 0xFF;     // NaN in every floating-point type
constexpr u16 SEVERAL = 0xFFFF;  // threads

struct Counts {
    u64 switches, barriers, copies, ldmatrix, bank_conflicts, mma_sparse, mma_dense;
};

struct Index {
    u32 x, y, z;
};

struct Range {
    u64 begin, end;
};

struct Settings {
    Index grid, block;
    u32 shared_bytes;
    u32 schedule;
    std::vector<Range> global;  // memory that kernels may read
    void (*kernel)(void** arguments);
    void** arguments;
};

// --- fibers --------------------------------------------------------------------------------------------------------

struct Copy {
    u32 target;
    const void* source;
    u32 bytes;
};

struct Fiber {
#if defined(__x86_64__)
    void* stack_pointer;
#else
    ucontext_t context;
#endif
    u32 thread;
    Index index;
    std::vector<Copy> copies;    // begun, in order
    std::vector<size_t> groups;  // where each committed group of copies ends
};

#if defined(__x86_64__)
// Push what the calling convention says a function keeps, swap stacks, pop it there.
extern "C" void shim_switch(void** save, void* load);
asm(R"(
.text
.weak shim_switch
.type shim_switch, @function
shim_switch:
    push %rbp
    push %rbx
    push %r12
    push %r13
    push %r14
    push %r15
    mov %rsp, (%rdi)
    mov %rsi, %rsp
    pop %r15
    pop %r14
    pop %r13
    pop %r12
    pop %rbx
    pop %rbp
    ret
.size shim_switch, . - shim_switch
)");

inline void prepare(Fiber& fiber, char* stack, void (*entry)()) {
    void** top = (void**)(stack + STACK_BYTES);
    top[-2] = (void*)entry;  // where shim_switch returns to; leaves the stack 8 off 16, as a call does
    for (int i = 3; i <= 8; i++) top[-i] = nullptr;  // its six registers
    fiber.stack_pointer = top - 8;
}
inline void switch_fibers(Fiber& from, Fiber& to) { shim_switch(&from.stack_pointer, to.stack_pointer); }
#else
inline void prepare(Fiber& fiber, char* stack, void (*entry)()) {
    getcontext(&fiber.context);
    fiber.context.uc_stack.ss_sp = stack;
    fiber.context.uc_stack.ss_size = STACK_BYTES;
    fiber.context.uc_link = nullptr;
    makecontext(&fiber.context, entry, 0);
}
inline void switch_fibers(Fiber& from, Fiber& to) { swapcontext(&from.context, &to.context); }
#endif

// --- a block -------------------------------------------------------------------------------------------------------

// What is known of 4 bytes of shared memory; masks are of bytes. An interval lies between two barriers.
struct Word {
    u32 write_interval, read_interval;
    u16 writer, reader;
    u8 write_mask, read_mask, known, in_flight;
};

struct Warp {
    u32 arrived;
    const char* operation;
    void* slots[WARP];
};

struct Block {
    const Settings* settings;
    Index index;
    std::vector<Fiber> fibers;
    std::vector<Warp> warps;
    Fiber scheduler;
    Fiber* current;
    std::vector<u32> ready;
    size_t first_ready;
    u32 live, at_barrier, interval;
    u64 random;
    u32 launches = 0, static_end;
    std::vector<u8> shared = std::vector<u8>(SHARED_END);
    std::vector<Word> words = std::vector<Word>(SHARED_END / 4);
    char* stacks = nullptr;
    size_t stack_count = 0;
    Counts counts;
    std::string failure;

    ~Block() {
        if (stacks) munmap(stacks, stack_count * STACK_BYTES);
    }
};

inline thread_local Block* block;

inline Fiber* next_ready() {
    auto& ready = block->ready;
    if (block->first_ready == ready.size()) return nullptr;
    u32 thread;
    if (block->settings->schedule == 1) {
        thread = ready[block->first_ready++];
        if (block->first_ready == ready.size()) ready.clear(), block->first_ready = 0;
        return &block->fibers[thread];
    }
    if (block->settings->schedule > 1) {
        block->random = block->random * 6364136223846793005u + 1442695040888963407u;  // Knuth's MMIX generator
        std::swap(ready[(block->random >> 33) % ready.size()], ready.back());
    }
    thread = ready.back();
    ready.pop_back();
    return &block->fibers[thread];
}

inline void switch_to(Fiber* to) {
    Fiber& from = *block->current;
    if (to == &from) return;
    block->current = to;
    block->counts.switches++;
    switch_fibers(from, *to);
}

// Run others until somebody wakes this fiber; with nobody left, the scheduler sees a deadlock.
inline void wait_for_others() {
    Fiber* next = next_ready();
    switch_to(next ? next : &block->scheduler);
}

[[noreturn]] inline void fail(const char* format, ...) {
    char text[400];
    va_list values;
    va_start(values, format);
    vsnprintf(text, sizeof text, format, values);
    va_end(values);
    char where[100];
    snprintf(where, sizeof where, "block (%u, %u, %u), thread %u: ", block->index.x, block->index.y, block->index.z,
             block->current->thread);
    block->failure = std::string(where) + text;
    switch_to(&block->scheduler);
    abort();  // a fiber that failed is not taken up again
}

inline void fiber_main() {
    block->settings->kernel(block->settings->arguments);
    Fiber& fiber = *block->current;
    if (block->warps[fiber.thread / WARP].arrived)
        fail("returns while its warp is in %s", block->warps[fiber.thread / WARP].operation);
    if (block->at_barrier) fail("returns while others wait at __syncthreads");
    for (const Copy& copy : fiber.copies)
        if (copy.bytes) fail("returns with a cp.async copy under way");
    block->live--;
    wait_for_others();
    abort();
}

inline void run_block(Block& own, Index index) {
    const Settings& settings = *own.settings;
    block = &own;
    own.index = index;
    own.ready.clear();
    own.first_ready = own.at_barrier = 0;
    own.live = own.fibers.size();
    own.interval = 1;
    own.random = settings.schedule * 0x9E3779B97F4A7C15u + (index.z * 4096 + index.y) * 4096 + index.x;
    std::fill(own.warps.begin(), own.warps.end(), Warp{});
    for (auto [begin, end] : {std::pair(0u, settings.shared_bytes), std::pair(STATIC_BEGIN, own.static_end)}) {
        std::fill(own.shared.begin() + begin, own.shared.begin() + end, POISON);
        std::fill(own.words.begin() + begin / 4, own.words.begin() + (end + 3) / 4, Word{});
    }
    for (u32 thread = own.fibers.size(); thread-- > 0;) {
        Fiber& fiber = own.fibers[thread];
        const u32 x = settings.block.x, y = settings.block.y;
        fiber.thread = thread;
        fiber.index = {thread % x, thread / x % y, thread / x / y};
        fiber.copies.clear();
        fiber.groups.clear();
        prepare(fiber, own.stacks + thread * STACK_BYTES, fiber_main);
        own.ready.push_back(thread);
    }
    own.current = &own.scheduler;
    switch_to(next_ready());
    if (own.live && own.failure.empty()) {
        own.current = &own.fibers[0];
        const char* operation = "nothing";
        for (const Warp& warp : own.warps)
            if (warp.arrived) operation = warp.operation;
        own.failure = "block (" + std::to_string(index.x) + ", " + std::to_string(index.y) + "): deadlock, " +
                      std::to_string(own.live) + " threads left, " + std::to_string(own.at_barrier) +
                      " at __syncthreads, others in " + operation;
    }
}

// --- shared memory -------------------------------------------------------------------------------------------------

inline void check_bounds(u32 address, u32 bytes) {
    const u64 end = (u64)address + bytes;
    const bool is_static = address >= STATIC_BEGIN && end <= block->static_end;
    if (end > block->settings->shared_bytes && !is_static)
        fail("shared memory out of bounds: %u bytes at %u of %u", bytes, address, block->settings->shared_bytes);
    if (address % bytes) fail("shared memory address %u is not a multiple of %u", address, bytes);
}

// Call visit(word, mask of its bytes) for all words of a range.
template <class Visit>
inline void for_words(u32 address, u32 bytes, Visit visit) {
    if (bytes < 4) return visit(block->words[address / 4], (u8)(((1u << bytes) - 1) << address % 4));
    for (u32 i = 0; i < bytes / 4; i++) visit(block->words[address / 4 + i], (u8)0xF);
}

inline void note_read(u32 address, u32 bytes) {
    const u16 me = block->current->thread;
    const u32 interval = block->interval;
    check_bounds(address, bytes);
    for_words(address, bytes, [&](Word& word, u8 mask) {
        if (word.in_flight & mask) fail("reads shared memory at %u before its cp.async copy was waited for", address);
        if (mask & ~word.known) fail("reads shared memory at %u that nobody has written", address);
        if (word.write_interval == interval && word.writer != me && word.write_mask & mask)
            fail("reads shared memory at %u that another thread has written since the last barrier", address);
        if (word.read_interval != interval) word.read_interval = interval, word.reader = me, word.read_mask = 0;
        if (word.reader != me) word.reader = SEVERAL;
        word.read_mask |= mask;
    });
}

inline void note_write(u32 address, u32 bytes) {
    const u16 me = block->current->thread;
    const u32 interval = block->interval;
    check_bounds(address, bytes);
    for_words(address, bytes, [&](Word& word, u8 mask) {
        if (word.in_flight & mask) fail("writes shared memory at %u while a cp.async copy to it is under way", address);
        if (word.write_interval == interval && word.writer != me && word.write_mask & mask)
            fail("writes shared memory at %u that another thread has written since the last barrier", address);
        if (word.read_interval == interval && word.reader != me && word.read_mask & mask)
            fail("writes shared memory at %u that another thread has read since the last barrier", address);
        if (word.write_interval != interval) word.write_interval = interval, word.writer = me, word.write_mask = 0;
        if (word.writer != me) word.writer = SEVERAL;
        word.write_mask |= mask;
        word.known |= mask;
    });
}

template <class T>
inline T load(u32 address) {
    note_read(address, sizeof(T));
    T value;
    memcpy(&value, &block->shared[address], sizeof value);
    return value;
}

template <class T>
inline void store(u32 address, T value) {
    note_write(address, sizeof(T));
    memcpy(&block->shared[address], &value, sizeof value);
}

// An element of a __shared__ array.
template <class T>
struct Element {
    u32 address;
    operator T() const { return load<T>(address); }
    T operator=(T value) const { return store(address, value), value; }
    T operator=(const Element& other) const { return *this = (T)other; }
    T operator+=(T value) const { return *this = *this + value; }
    T operator-=(T value) const { return *this = *this - value; }
    T operator|=(T value) const { return *this = *this | value; }
};

// An array takes its place in shared memory at its first use in a launch: kernels do not share theirs.
template <class T, u32 COUNT>
struct SharedArray {
    mutable u32 begin, launch = 0;
    void take_place() const {
        launch = block->launches;
        begin = (block->static_end + 15) / 16 * 16;
        block->static_end = begin + COUNT * sizeof(T);
        if (block->static_end > SHARED_END) fail("__shared__ arrays take more than 48 KiB");
        std::fill(block->shared.begin() + begin, block->shared.begin() + block->static_end, POISON);
        std::fill(block->words.begin() + begin / 4, block->words.begin() + (block->static_end + 3) / 4, Word{});
    }
    Element<T> operator[](u64 index) const {
        if (launch != block->launches) take_place();
        if (index >= COUNT) fail("index %llu of a __shared__ array of %u", index, COUNT);
        return {begin + (u32)(index * sizeof(T))};
    }
};

// --- collectives ---------------------------------------------------------------------------------------------------

inline void wake_all_but_current(u32 first, u32 count) {
    for (u32 thread = first + count; thread-- > first;)
        if (thread != block->current->thread) block->ready.push_back(thread);
}

// Each lane brings a slot; the last to arrive does the work for all of them.
template <class Work>
inline void collective(const char* operation, void* slot, Work work) {
    const u32 thread = block->current->thread;
    Warp& warp = block->warps[thread / WARP];
    if (warp.arrived && strcmp(warp.operation, operation))
        fail("calls %s while other lanes of its warp are in %s", operation, warp.operation);
    warp.operation = operation;
    warp.slots[thread % WARP] = slot;
    if (++warp.arrived < WARP) return wait_for_others();
    warp.arrived = 0;
    work(warp);
    wake_all_but_current(thread / WARP * WARP, WARP);
}

inline void barrier() {
    const Warp& warp = block->warps[block->current->thread / WARP];
    if (warp.arrived) fail("calls __syncthreads while other lanes of its warp are in %s", warp.operation);
    if (block->live != block->fibers.size()) fail("calls __syncthreads after other threads have returned");
    if (++block->at_barrier < block->live) return wait_for_others();
    block->at_barrier = 0;
    block->interval++;
    block->counts.barriers++;
    wake_all_but_current(0, block->fibers.size());
}

template <class T>
struct Exchange {
    T value;
    int parameter;
    T result;
};

// Lane l receives the value of the lane that source(l, its parameter) names, its own if there is no such lane.
template <class T, class Source>
inline T exchange(const char* operation, T value, int parameter, Source source) {
    Exchange<T> slot = {value, parameter, value};
    collective(operation, &slot, [&](Warp& warp) {
        for (int lane = 0; lane < (int)WARP; lane++) {
            auto& own = *(Exchange<T>*)warp.slots[lane];
            const int from = source(lane, own.parameter);
            if (from >= 0 && from < (int)WARP) own.result = ((Exchange<T>*)warp.slots[from])->value;
        }
    });
    return slot.result;
}

// --- tensor cores --------------------------------------------------------------------------------------------------

struct Fragments {
    float* d;
    const u32* a;
    u32 b[4];
    u32 metadata;
};

// d += a b, summed in double and rounded once. `column` gives the row of b for each kept value of a.
template <int INNER>
inline void multiply(Warp& warp, const float (&a)[16][16], const u8 (&column)[16][16], const float (&b)[INNER][8]) {
    for (int row = 0; row < 16; row++) {
        double sums[8] = {};
        for (int k = 0; k < 16; k++)
            for (int n = 0; n < 8; n++) sums[n] += (double)a[row][k] * b[column[row][k]][n];
        for (int n = 0; n < 8; n++) {
            float& d = ((Fragments*)warp.slots[row % 8 * 4 + n / 2])->d[row / 8 * 2 + n % 2];
            d = (float)(d + sums[n]);
        }
    }
}

template <class Type, int INNER>
inline void gather(Warp& warp, float (&a)[16][16], float (&b)[INNER][8]) {
    for (int lane = 0; lane < (int)WARP; lane++) {
        const Fragments& own = *(Fragments*)warp.slots[lane];
        const int g = lane / 4, t = lane % 4;
        for (int r = 0; r < 4; r++)
            for (int i = 0; i < 2; i++) a[g + r % 2 * 8][2 * t + r / 2 * 8 + i] = Type::to_float(own.a[r] >> 16 * i);
        for (int r = 0; r < INNER / 8; r++)
            for (int i = 0; i < 2; i++) b[8 * r + 2 * t + i][g] = Type::to_float(own.b[r] >> 16 * i);
    }
}

template <int SELECTOR>
inline void places(Warp& warp, u8 (&column)[16][16]) {
    for (int row = 0; row < 16; row++)
        for (int group = 0; group < 8; group++) {
            const int lane = row % 8 * 4 + 2 * SELECTOR + group / 4;
            const u32 nibble = ((Fragments*)warp.slots[lane])->metadata >> (row / 8 * 16 + group % 4 * 4) & 15;
            if ((nibble & 3) >= nibble >> 2) fail("mma.sp: metadata 0x%x of lane %d is not ascending", nibble, lane);
            column[row][2 * group] = 4 * group + (nibble & 3);
            column[row][2 * group + 1] = 4 * group + (nibble >> 2);
        }
}

template <class Type, int SELECTOR>
inline void mma_sparse(float (&d)[4], const u32 (&a)[4], const u32 (&b)[4], u32 metadata) {
    Fragments slot = {d, a, {b[0], b[1], b[2], b[3]}, metadata};
    collective(SELECTOR ? "mma.sp, selector 1" : "mma.sp, selector 0", &slot, [](Warp& warp) {
        float a[16][16], b[32][8];
        u8 column[16][16];
        gather<Type>(warp, a, b);
        places<SELECTOR>(warp, column);
        multiply(warp, a, column, b);
        block->counts.mma_sparse++;
    });
}

template <class Type>
inline void mma_dense(float (&d)[4], const u32 (&a)[4], u32 b0, u32 b1) {
    Fragments slot = {d, a, {b0, b1}, 0};
    collective("mma", &slot, [](Warp& warp) {
        float a[16][16], b[16][8];
        u8 column[16][16];
        gather<Type>(warp, a, b);
        for (auto& row : column)
            for (int k = 0; k < 16; k++) row[k] = k;
        multiply(warp, a, column, b);
        block->counts.mma_dense++;
    });
}

inline u32 bits_of(float value) {
    u32 bits;
    memcpy(&bits, &value, sizeof bits);
    return bits;
}

inline float float_of(u32 bits) {
    float value;
    memcpy(&value, &bits, sizeof value);
    return value;
}

inline float half_to_float(u16 half) {
    const int exponent = half >> 10 & 31, fraction = half & 1023;
    const float sign = half >> 15 ? -1.0f : 1.0f;
    if (exponent == 31) return fraction ? NAN : sign * INFINITY;
    return sign * (exponent ? std::ldexp(1024.0f + fraction, exponent - 25) : std::ldexp((float)fraction, -24));
}

inline const std::vector<float> half_values = [] {
    std::vector<float> values(65536);
    for (u32 half = 0; half < 65536; half++) values[half] = half_to_float(half);
    return values;
}();

inline u16 half_of(float value) {
    const u16 sign = bits_of(value) >> 16 & 0x8000;
    const float size = std::fabs(value);
    if (std::isnan(value)) return 0x7FFF;
    if (size >= 65520.0f) return sign | 0x7C00;
    if (size < 6.103515625e-05f) return sign | (u16)std::nearbyint(size * 16777216.0f);  // in steps of 2^-24
    const u32 bits = bits_of(size) - (112u << 23);  // the exponent's bias: 127 - 15
    return sign | (u16)((bits + 0xFFF + (bits >> 13 & 1)) >> 13);
}

// --- launching -----------------------------------------------------------------------------------------------------

template <class T>
inline T argument(void* place) {
    T value;
    memcpy(&value, place, sizeof value);
    return value;
}

template <class... T, size_t... I>
inline void call(void (*kernel)(T...), void** arguments, std::index_sequence<I...>) {
    kernel(argument<std::remove_const_t<T>>(arguments[I])...);
}

template <class... T>
constexpr size_t parameter_count(void (*)(T...)) {
    return sizeof...(T);
}

template <class... T>
inline void call(void (*kernel)(T...), void** arguments) {
    call(kernel, arguments, std::index_sequence_for<T...>());
}

template <auto KERNEL>
void invoke(void** arguments) {
    call(KERNEL, arguments);
}

struct Kernel {
    const char* name;
    void (*invoke)(void** arguments);
    size_t parameters;
};

template <auto KERNEL>
constexpr Kernel describe(const char* name) {
    return {name, invoke<KERNEL>, parameter_count(KERNEL)};
}

// One block serves all launches: its stacks and shared memory are touched already.
inline std::string launch(const Settings& settings, Counts& counts) {
    static Block own;
    const size_t threads = (size_t)settings.block.x * settings.block.y * settings.block.z;
    if (settings.shared_bytes > MAX_DYNAMIC) return "asks for more shared memory than any device has";
    if (own.stack_count < threads) {
        if (own.stacks) munmap(own.stacks, own.stack_count * STACK_BYTES);
        const int flags = MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE;
        own.stacks = (char*)mmap(nullptr, threads * STACK_BYTES, PROT_READ | PROT_WRITE, flags, -1, 0);
        own.stack_count = threads;
    }
    own.fibers.resize(threads);
    own.warps.resize(threads / WARP);
    own.settings = &settings;
    own.counts = {};
    own.failure.clear();
    own.launches++;
    own.static_end = STATIC_BEGIN;
    for (u32 z = 0; z < settings.grid.z; z++)
        for (u32 y = 0; y < settings.grid.y; y++)
            for (u32 x = 0; x < settings.grid.x && own.failure.empty(); x++) run_block(own, {x, y, z});
    counts = own.counts;
    return own.failure;
}

}  // namespace shim

// --- what device.cuh and CUDA itself give to kernels -----------------------------------------------------------------

#define __global__
#define __launch_bounds__(...)
#define DEVICE inline
#define SHARED_ARRAY(type, name, count) static shim::SharedArray<type, count> name
#define threadIdx (shim::block->current->index)
#define blockIdx (shim::block->index)
#define blockDim (shim::block->settings->block)
#define gridDim (shim::block->settings->grid)

inline void __syncthreads() { shim::barrier(); }
inline u32 thread_anew() { return threadIdx.x; }
inline void __threadfence() {}
inline int atomicAdd(int* global, int amount) {
    const int former = *global;
    *global += amount;
    return former;
}
inline int __popc(u32 value) { return __builtin_popcount(value); }
inline int __ffs(int value) { return __builtin_ffs(value); }
inline int __clz(int value) { return value ? __builtin_clz(value) : 32; }
inline u32 __float_as_uint(float value) { return shim::bits_of(value); }
inline float __uint_as_float(u32 bits) { return shim::float_of(bits); }
inline int __float_as_int(float value) { return (int)shim::bits_of(value); }
inline float __int_as_float(int bits) { return shim::float_of((u32)bits); }
using std::max;
using std::min;

inline u32 dynamic_shared() { return 0; }
inline Chunk load_shared_chunk(u32 address) { return shim::load<Chunk>(address); }
inline void store_shared_chunk(u32 address, Chunk chunk) { shim::store(address, chunk); }
inline float load_shared_float(u32 address) { return shim::load<float>(address); }
inline void store_shared_float(u32 address, float value) { shim::store(address, value); }

inline u32 select_bytes(u32 low, u32 high, u32 selector) {
    if (selector & 0x8888) shim::fail("select_bytes: selector 0x%x names a byte above 7", selector & 0xFFFF);
    const u64 both = (u64)high << 32 | low;
    u32 bytes = 0;
    for (u32 i = 0; i < 4; i++) bytes |= (u32)(both >> 8 * (selector >> 4 * i & 7) & 0xFF) << 8 * i;
    return bytes;
}

inline void cp_async_chunk(u32 shared_address, const void* source, u32 bytes = 16) {
    using namespace shim;
    if (bytes != 0 && bytes != 16) fail("cp.async of %u bytes", bytes);
    if (bytes && (u64)source % 16) fail("cp.async from an address that is no multiple of 16");
    bool known = bytes == 0;
    for (const Range& range : block->settings->global)
        known |= (u64)source >= range.begin && (u64)source + bytes <= range.end;
    if (!known) fail("cp.async from outside of the tensors");
    note_write(shared_address, 16);
    for_words(shared_address, 16, [](Word& word, u8) { word.in_flight = 0xF; });
    memset(&block->shared[shared_address], POISON, 16);
    block->current->copies.push_back({shared_address, source, bytes});
    block->counts.copies++;
}

inline void cp_async_commit() {
    shim::Fiber& fiber = *shim::block->current;
    fiber.groups.push_back(fiber.copies.size());
}

template <int PENDING>
inline void cp_async_wait() {
    using namespace shim;
    Fiber& fiber = *block->current;
    if (fiber.groups.size() <= PENDING) return;
    const size_t groups = fiber.groups.size() - PENDING, done = fiber.groups[groups - 1];
    for (size_t i = 0; i < done; i++) {
        const Copy& copy = fiber.copies[i];
        for_words(copy.target, 16, [](Word& word, u8) { word.in_flight = 0; });
        note_write(copy.target, 16);
        memset(&block->shared[copy.target], 0, 16);
        memcpy(&block->shared[copy.target], copy.source, copy.bytes);
    }
    fiber.copies.erase(fiber.copies.begin(), fiber.copies.begin() + done);
    fiber.groups.erase(fiber.groups.begin(), fiber.groups.begin() + groups);
    for (size_t& end : fiber.groups) end -= done;
}

inline void ldmatrix_x4(u32 (&fragment)[4], u32 row_address) {
    using namespace shim;
    struct Slot {
        u32* fragment;
        u32 row_address;
    } slot = {fragment, row_address};
    note_read(row_address, 16);
    collective("ldmatrix", &slot, [](Warp& warp) {
        for (int matrix = 0; matrix < 4; matrix++) {
            int rows_at[8] = {}, most = 0;  // rows in each 16 bytes of the 128 that are served at once
            for (int row = 0; row < 8; row++) {
                const u32 address = ((Slot*)warp.slots[8 * matrix + row])->row_address;
                most = std::max(most, ++rows_at[address / 16 % 8]);
            }
            block->counts.bank_conflicts += most - 1;
            for (int lane = 0; lane < (int)WARP; lane++) {
                const u32 address = ((Slot*)warp.slots[8 * matrix + lane / 4])->row_address + lane % 4 * 4;
                memcpy(&((Slot*)warp.slots[lane])->fragment[matrix], &block->shared[address], 4);
            }
        }
        block->counts.ldmatrix++;
    });
}

struct Float16 {
    static float to_float(u16 bits) { return shim::half_values[bits]; }
    static u16 from_float(float value) { return shim::half_of(value); }
    template <int SELECTOR>
    static void mma_sparse(float (&d)[4], const u32 (&a)[4], const u32 (&b)[4], u32 metadata) {
        shim::mma_sparse<Float16, SELECTOR>(d, a, b, metadata);
    }
    static void mma_dense(float (&d)[4], const u32 (&a)[4], u32 b0, u32 b1) {
        shim::mma_dense<Float16>(d, a, b0, b1);
    }
};

struct BFloat16 {
    static float to_float(u16 bits) { return shim::float_of((u32)bits << 16); }
    static u16 from_float(float value) {
        const u32 bits = shim::bits_of(value);
        return std::isnan(value) ? 0x7FFF : (bits + 0x7FFF + (bits >> 16 & 1)) >> 16;
    }
    template <int SELECTOR>
    static void mma_sparse(float (&d)[4], const u32 (&a)[4], const u32 (&b)[4], u32 metadata) {
        shim::mma_sparse<BFloat16, SELECTOR>(d, a, b, metadata);
    }
    static void mma_dense(float (&d)[4], const u32 (&a)[4], u32 b0, u32 b1) {
        shim::mma_dense<BFloat16>(d, a, b0, b1);
    }
};

const u32 WHOLE_WARP = 0xffffffffu;

template <typename T>
inline T shuffle(T value, int lane) {
    return shim::exchange("shuffle", value, lane, [](int, int from) { return from & 31; });
}

template <typename T>
inline T shuffle_xor(T value, int lane_bits) {
    return shim::exchange("shuffle_xor", value, lane_bits, [](int lane, int bits) { return lane ^ bits; });
}

template <typename T>
inline T shuffle_down(T value, int distance) {
    return shim::exchange("shuffle_down", value, distance, [](int lane, int by) { return lane + by; });
}

template <typename T>
inline T shuffle_up(T value, int distance) {
    return shim::exchange("shuffle_up", value, distance, [](int lane, int by) { return lane - by; });
}

inline u32 ballot(bool vote) {
    struct Slot {
        bool vote;
        u32 result;
    } slot = {vote, 0};
    shim::collective("ballot", &slot, [](shim::Warp& warp) {
        u32 votes = 0;
        for (int lane = 0; lane < 32; lane++) votes |= (u32)((Slot*)warp.slots[lane])->vote << lane;
        for (void* other : warp.slots) ((Slot*)other)->result = votes;
    });
    return slot.result;
}
