// Runs a kernel's blocks one after the other, each thread of a block as a coroutine that gives way where it has to wait for
// others. See emulator.h.
#include "emulator.h"

#include <csetjmp>
#include <cstdio>
#include <memory>
#include <ucontext.h>
#include <vector>

thread_local Index threadIdx, blockIdx;

// Memory that a kernel may read, or write.
struct Range {
    uint64_t start, bytes, writable;
};

// What emulate() is asked to run.
struct Launch {
    void (*kernel)(const void* params);
    const void* params;
    uint64_t params_bytes;
    uint64_t grid[3];
    uint64_t threads;
    uint64_t shared_bytes;
    const Range* ranges;
    uint64_t ranges_count;
};

namespace {

constexpr int LANES = 32;
constexpr size_t STACK = 64 << 10;

// Where some threads wait until all of them have come; each brings what the last one shall work on.
struct Meeting {
    const char* what = nullptr;
    size_t arrived = 0;
    uint64_t round = 0;
    void* brought[LANES] = {};
};

struct Copy {
    void* to;
    const void* from;
    int bytes;
};

struct Thread {
    std::unique_ptr<char[]> stack{new char[STACK]};
    ucontext_t start;
    jmp_buf pause;
    bool started, done;
    const uint64_t* awaited; // goes on when this is no longer `seen`
    uint64_t seen;
    std::vector<Copy> copies;
};

struct Machine {
    const Launch& launch;
    std::vector<Thread> threads;
    std::vector<Meeting> warps;
    Meeting block;
    std::vector<unsigned char> shared;
    unsigned char* shared_start = nullptr;
    bool backwards = false;
    size_t current = 0;
    jmp_buf scheduler;
    char error[256] = "";

    explicit Machine(const Launch& launch)
        : launch(launch), threads(launch.threads), warps(launch.threads / LANES), shared(launch.shared_bytes + 128) {
        const uintptr_t start = reinterpret_cast<uintptr_t>(shared.data());
        shared_start = shared.data() + (128 - start % 128) % 128;
    }
};

thread_local Machine* machine;

template <typename... Arguments> [[noreturn]] void fail(const char* format, Arguments... arguments) {
    const int length = snprintf(machine->error, sizeof machine->error, "block %u,%u,%u thread %zu: ", blockIdx.x, blockIdx.y,
                                blockIdx.z, machine->current);
    snprintf(machine->error + length, sizeof machine->error - length, format, arguments...);
    _longjmp(machine->scheduler, 1);
}

void run_thread() {
    machine->launch.kernel(machine->launch.params);
    machine->threads[machine->current].done = true;
    _longjmp(machine->scheduler, 1);
}

// Until the current thread gives way, ends or fails. A jump costs a hundredth of what changing a ucontext_t costs.
__attribute__((noinline)) void resume() {
    Thread& thread = machine->threads[machine->current];
    if (_setjmp(machine->scheduler)) return;
    if (thread.started) _longjmp(thread.pause, 1);
    thread.started = true;
    setcontext(&thread.start);
}

void meet(Meeting& meeting, size_t members, size_t member, const char* what, void* brought, void (*together)(void**)) {
    if (meeting.arrived == 0) meeting.what = what;
    if (meeting.what != what) fail("%s, while others of its warp: %s", what, meeting.what);
    if (together) meeting.brought[member] = brought;
    if (++meeting.arrived == members) {
        if (together) together(meeting.brought);
        meeting.arrived = 0;
        ++meeting.round;
        return;
    }
    Thread& me = machine->threads[machine->current];
    me.awaited = &meeting.round;
    me.seen = meeting.round;
    if (!_setjmp(me.pause)) _longjmp(machine->scheduler, 1);
}

void meet_warp(const char* what, void* brought, void (*together)(void**)) {
    meet(machine->warps[machine->current / LANES], LANES, machine->current % LANES, what, brought, together);
}

// Lets each of a warp's threads go on until it waits; false if none could, or one failed. Counts those that ended.
bool run_warp(size_t warp, size_t& left) {
    Machine& m = *machine;
    bool moved = false;
    for (size_t i = 0; i < LANES; ++i) {
        m.current = warp * LANES + (m.backwards ? LANES - 1 - i : i);
        Thread& thread = m.threads[m.current];
        if (thread.done || (thread.awaited && *thread.awaited == thread.seen)) continue;
        thread.awaited = nullptr;
        threadIdx = {unsigned(m.current), 0, 0};
        resume();
        if (m.error[0]) return false;
        left -= thread.done;
        moved = true;
    }
    return moved;
}

void run_block() {
    Machine& m = *machine;
    m.block = Meeting();
    for (Meeting& warp : m.warps) warp = Meeting();
    memset(m.shared.data(), 0xff, m.shared.size());
    for (Thread& thread : m.threads) {
        getcontext(&thread.start);
        thread.start.uc_stack.ss_sp = thread.stack.get();
        thread.start.uc_stack.ss_size = STACK;
        thread.start.uc_link = nullptr;
        makecontext(&thread.start, run_thread, 0);
        thread.started = thread.done = false;
        thread.awaited = nullptr;
        thread.copies.clear();
    }
    // Each warp runs as far as it can before the next one moves, so that none is in step with another by chance.
    const size_t warps = m.warps.size();
    for (size_t left = m.threads.size(); left > 0;) {
        bool moved = false;
        for (size_t w = 0; w < warps; ++w) {
            while (run_warp(m.backwards ? warps - 1 - w : w, left)) moved = true;
            if (m.error[0]) return;
        }
        if (!moved) {
            snprintf(m.error, sizeof m.error, "block %u,%u,%u: threads wait for others that have ended", blockIdx.x,
                     blockIdx.y, blockIdx.z);
            return;
        }
    }
}

} // namespace

// Null, or what is wrong; the text is the calling thread's until it calls again.
extern "C" const char* emulate(const Launch* launch) {
    static thread_local char error[sizeof(Machine::error)];
    Machine here(*launch);
    machine = &here;
    uint64_t number = 0;
    for (unsigned z = 0; z < launch->grid[2]; ++z)
        for (unsigned y = 0; y < launch->grid[1]; ++y)
            for (unsigned x = 0; x < launch->grid[0]; ++x) {
                blockIdx = {x, y, z};
                here.backwards = number++ % 2;
                run_block();
                if (here.error[0]) {
                    memcpy(error, here.error, sizeof error);
                    return error;
                }
            }
    return nullptr;
}

void check_launch(size_t threads, size_t params) {
    if (threads != machine->launch.threads || threads % LANES) fail("%zu threads, not %zu", size_t(machine->launch.threads), threads);
    if (params != machine->launch.params_bytes)
        fail("parameters of %zu bytes, not %zu", size_t(machine->launch.params_bytes), params);
}

void check_access(const void* p, size_t bytes, bool write) {
    const uint64_t start = reinterpret_cast<uintptr_t>(p);
    const char* verb = write ? "writes" : "reads";
    if (start % bytes) fail("%s %zu bytes at an address that is no multiple of it", verb, bytes);
    for (uint64_t i = 0; i < machine->launch.ranges_count; ++i) {
        const Range& range = machine->launch.ranges[i];
        if (start >= range.start && start + bytes <= range.start + range.bytes && (range.writable || !write)) return;
    }
    fail("%s %zu bytes where there is nothing of its own", verb, bytes);
}

static void check_shared(const void* p, size_t bytes) {
    const unsigned char* at = static_cast<const unsigned char*>(p);
    const unsigned char* end = machine->shared_start + machine->launch.shared_bytes;
    if (at < machine->shared_start || at + bytes > end) fail("reaches beyond its shared memory");
    if (reinterpret_cast<uintptr_t>(p) % bytes) fail("reaches for %zu bytes of shared memory between two of them", bytes);
}

unsigned char* shared_memory() { return machine->shared_start; }

void __syncthreads() { meet(machine->block, machine->threads.size(), 0, "waits at a barrier", nullptr, nullptr); }

namespace {
struct Shuffle {
    float x;
    int distance;
    float result;
};

struct Matrices {
    uint32_t* to;
    const void* row;
};

// Element `column` of row `row` of matrix `matrix`.
uint32_t element(void** lanes, int matrix, int row, int column) {
    uint16_t bits;
    const void* address = static_cast<const Matrices*>(lanes[8 * matrix + row])->row;
    memcpy(&bits, static_cast<const char*>(address) + 2 * column, 2);
    return bits;
}

struct Product {
    float* c;
    const uint32_t* a;
    uint32_t b[2];
    float (*widen)(uint16_t);
};

void multiply(void** lanes) {
    float a[16][16], b[16][8];
    for (int lane = 0; lane < LANES; ++lane) {
        const Product& p = *static_cast<const Product*>(lanes[lane]);
        const int g = lane / 4, t = lane % 4;
        for (int half = 0; half < 2; ++half) {
            const auto number = [&](uint32_t pair) { return p.widen(uint16_t(pair >> 16 * half)); };
            a[g][2 * t + half] = number(p.a[0]);
            a[g + 8][2 * t + half] = number(p.a[1]);
            a[g][2 * t + 8 + half] = number(p.a[2]);
            a[g + 8][2 * t + 8 + half] = number(p.a[3]);
            b[2 * t + half][g] = number(p.b[0]);
            b[2 * t + 8 + half][g] = number(p.b[1]);
        }
    }
    for (int lane = 0; lane < LANES; ++lane) {
        const Product& p = *static_cast<const Product*>(lanes[lane]);
        for (int i = 0; i < 4; ++i) {
            const int row = lane / 4 + i / 2 * 8, column = lane % 4 * 2 + i % 2;
            float sum = p.c[i];
            for (int k = 0; k < 16; ++k) sum += a[row][k] * b[k][column];
            p.c[i] = sum;
        }
    }
}
} // namespace

float __shfl_xor_sync(uint32_t lanes, float x, int distance) {
    if (lanes != 0xffffffffu) fail("shuffles without all lanes");
    Shuffle mine{x, distance, 0.f};
    meet_warp("shuffles", &mine, [](void** all) {
        for (int lane = 0; lane < LANES; ++lane) {
            Shuffle& one = *static_cast<Shuffle*>(all[lane]);
            one.result = static_cast<const Shuffle*>(all[lane ^ one.distance])->x;
        }
    });
    return mine.result;
}

void load_matrices(uint32_t (&to)[4], const void* row) {
    check_shared(row, 16);
    Matrices mine{to, row};
    meet_warp("loads matrices", &mine, [](void** all) {
        for (int lane = 0; lane < LANES; ++lane)
            for (int matrix = 0; matrix < 4; ++matrix) {
                const int g = lane / 4, t = lane % 4;
                static_cast<Matrices*>(all[lane])->to[matrix] =
                    element(all, matrix, g, 2 * t) | element(all, matrix, g, 2 * t + 1) << 16;
            }
    });
}

void load_transposed(uint32_t (&to)[4], const void* row) {
    check_shared(row, 16);
    Matrices mine{to, row};
    meet_warp("loads transposed matrices", &mine, [](void** all) {
        for (int lane = 0; lane < LANES; ++lane)
            for (int matrix = 0; matrix < 4; ++matrix) {
                const int g = lane / 4, t = lane % 4;
                static_cast<Matrices*>(all[lane])->to[matrix] =
                    element(all, matrix, 2 * t, g) | element(all, matrix, 2 * t + 1, g) << 16;
            }
    });
}

void multiply_add(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1, float (*widen_bits)(uint16_t)) {
    Product mine{c, a, {b0, b1}, widen_bits};
    meet_warp("multiplies", &mine, multiply);
}

static void finish(const Copy& copy) {
    memcpy(copy.to, copy.from, copy.bytes);
    memset(static_cast<char*>(copy.to) + copy.bytes, 0, 16 - copy.bytes);
}

void copy_async(void* to, const void* from, int bytes) {
    check_shared(to, 16);
    if (bytes == 16) check_access(from, 16, false);
    else if (bytes != 0) fail("copies %d of 16 bytes", bytes);
    const Copy copy{to, from, bytes};
    if (machine->backwards) finish(copy);
    else machine->threads[machine->current].copies.push_back(copy);
}

void wait_for_copies() {
    std::vector<Copy>& copies = machine->threads[machine->current].copies;
    for (const Copy& copy : copies) finish(copy);
    copies.clear();
}
