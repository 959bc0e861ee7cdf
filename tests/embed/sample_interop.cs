// The C# binding against the C library: where its fields lie, and a session on a ring of sample_writer.
//
//     sample_interop.exe layout         one line a field: STRUCT FIELD OFFSET, or STRUCT - SIZE; then one a constant
//     sample_interop.exe play RING      acquires, compares every pixel, pushes; says what it saw
using System;
using System.Reflection;
using System.Runtime.InteropServices;
using System.Text.RegularExpressions;
using CFEngine;

static class Program
{
    static string Snake(string name) { return Regex.Replace(name, "(?<=[a-z0-9])([A-Z])", "_$1").ToLowerInvariant(); }

    static void Layout()
    {
        foreach (Type type in typeof(CfSession).Assembly.GetTypes())
        {
            if (type.Namespace != "CFEngine") continue;
            if (type.IsEnum)
                foreach (object value in Enum.GetValues(type))
                    Console.WriteLine("{0} {1} {2}", Snake(type.Name), Snake(value.ToString()), Convert.ToInt64(value));
            else if (type.IsValueType)
            {
                Console.WriteLine("{0} - {1}", Snake(type.Name), Marshal.SizeOf(type));
                foreach (FieldInfo field in type.GetFields(BindingFlags.Public | BindingFlags.Instance))
                    Console.WriteLine("{0} {1} {2}", Snake(type.Name), Snake(field.Name),
                        Marshal.OffsetOf(type, field.Name));
            }
        }
    }

    static void Require(bool condition, string what)
    {
        if (condition) return;
        Console.WriteLine("{0} is false: {1}", what, CfSession.LastError);
        Environment.Exit(1);
    }

    static unsafe int WrongPixels(ref CfFrame frame)
    {
        int wrong = 0;
        byte id = (byte)frame.Id;
        for (int y = 0; y < frame.Height; ++y)
        {
            byte* row = (byte*)frame.Planes.First.Data + (ulong)y * frame.Planes.First.Stride;
            for (int x = 0; x < frame.Width; ++x)
                if (row[4 * x] != id || row[4 * x + 1] != (byte)(5 * x + 3 * id) || row[4 * x + 2] != (byte)(7 * y + id)
                    || row[4 * x + 3] != 255)
                    ++wrong;
        }
        return wrong;
    }

    static CfFrame frame;
    static CfSessionState state;

    /// Acquire until `count` new frames were seen.
    static void See(CfSession session, int count, ref int wrong)
    {
        ulong last = frame.Id;
        while (count > 0)
        {
            session.PollState(ref state);
            if (!session.TryAcquire(Native.cf_now_ns(), CfPolicy.Latest, ref frame)) continue;
            if (frame.Id != last)
            {
                wrong += WrongPixels(ref frame);
                --count;
            }
            last = frame.Id;
            Require(session.Release(ref frame), "release");
        }
    }

    static void Play(string ring)
    {
        CfResult result;
        Require(CfSession.Open(ring + "-none", out result) == null && result == CfResult.ErrorNotFound, "no such ring");
        CfSession session = CfSession.Open(ring, out result);
        Require(session != null, "open");
        int wrong = 0;
        See(session, 3, ref wrong);
        long before = GC.GetTotalMemory(true);
        int collections = GC.CollectionCount(0);
        See(session, 6, ref wrong);
        long garbage = GC.GetTotalMemory(false) - before + 1000000L * (GC.CollectionCount(0) - collections);
        ulong id;
        Require(session.PushAction(1, -1, out id) == CfResult.Success && id == 1, "action");
        Require(session.PushPrompt("hügel", out id) == CfResult.Success && id == 2, "prompt");
        Require(session.Push(CfEventKind.Reset, out id) == CfResult.Success && id == 3, "reset");
        while (frame.LastEventId < id) See(session, 1, ref wrong);
        var stats = new CfStats();
        Require(session.GetStats(ref stats) == CfResult.Success && stats.EventsPushed == 3, "stats");
        Console.WriteLine("wrong {0} garbage {1} state {2} size {3}x{4} new {5}", wrong, garbage, state.State,
            frame.Width, frame.Height, stats.FramesNew);
        session.Dispose();
    }

    static void Main(string[] words)
    {
        if (words[0] == "layout") Layout();
        else Play(words[1]);
    }
}
